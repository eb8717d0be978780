"""The coordinator of a job of changing members, and the election of a new one."""
