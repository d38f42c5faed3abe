"""The errors a person meets, by what they can do about them."""


class SettingError(ValueError):
    """A value in params.yaml is wrong. The message names `section.key`, the value, what is allowed."""


class InputError(ValueError):
    """A user's file is wrong. The message names the file, the place in it and what is expected."""


class RunError(RuntimeError):
    """A run failed for a reason outside settings and inputs. The message says what to look at."""


class NonFiniteLossError(RunError):
    """A loss or gradient became NaN, infinite or too large; its batch was saved for inspection."""


class GeneratorError(RunError):
    """The generator died, hung or answered something unusable."""
