"""Mistakes that a user can mend: one line that says what and where, instead of a traceback."""


class UserError(ValueError):
    """A wrong key, file or number; the message names it and what to do."""

    def __str__(self):
        # A loader process sends the text of its traceback, which ends with the message.
        return super().__str__().rsplit(f".{type(self).__name__}: ", 1)[-1].strip()


class NonFinite(UserError):
    """A loss, a gradient or a tensor that is not finite, or overflows of fp16 without end."""
