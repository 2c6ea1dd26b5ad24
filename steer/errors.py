"""
The one exception that a user's mistake raises: a single line that says what was given, expected, and the
mend.
"""


class SteerError(ValueError):
    """Bad input to `steer`. The message is one line and names the fix."""
