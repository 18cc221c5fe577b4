"""`python -m handmill` is the command `handmill`."""

from handmill.cli import main

raise SystemExit(main())
