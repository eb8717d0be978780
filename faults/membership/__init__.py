"""Who is in the job: epochs, liveness and quorums."""
