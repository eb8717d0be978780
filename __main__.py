"""`python -m heteromesh` is the `heteromesh` command."""

from heteromesh.runtime.cli.main import main

raise SystemExit(main())
