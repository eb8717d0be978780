"""The one exception for mistakes a user can mend: the command line prints it and exits with 2."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message is one sentence naming the value, the rule and the way out."""
