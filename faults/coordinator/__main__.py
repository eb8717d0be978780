"""`python -m heteromesh.faults.coordinator` serves one job."""

from heteromesh.faults.coordinator.main import main

raise SystemExit(main())
