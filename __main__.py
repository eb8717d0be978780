"""`python -m heteromesh` is the `heteromesh` command."""

from heteromesh.runtime.cli import main

raise SystemExit(main())
