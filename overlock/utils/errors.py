"""Errors that a user can put right."""


class UserError(ValueError):
    """Something that the user can put right; the message is one sentence that says how."""


class CheckpointError(UserError):
    """A weight file that cannot be found, read or used for this model."""
