"""The final answer of a worked solution: the number alone after `####`, as in GSM8K.

The format is that of Cobbe et al. 2021, arXiv:2110.14168; how a number may be written is decided here.
Numbers are decimal, never binary floats: 0.1 + 0.2 in a solution is 0.3 in its answer.
"""

import re
from decimal import Decimal

_NUMBER = r"(?:[-−]?\$?|\$[-−])(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)\.?"
_FINAL = re.compile(rf"(?<!#)####[^\S\n]*({_NUMBER})[^\S\n]*$", re.MULTILINE)
_WHOLE = re.compile(_NUMBER)
_NO_DIGIT = re.compile(r"[^0-9.]")

EXPECTED = "a line that ends in '####' and a number alone, such as '#### 72', '#### -1,250' or '#### $3.50'"
"""What `find_answer` finds, for messages."""


def find_answer(text: str) -> Decimal | None:
    """The number after the last `####` that has one; None where there is none.

    The number must be all that follows on the line: of `#### 3/4`, `#### 1 or 2` and `#### 1,5` it is not clear which
    number is meant, so they hold none.
    """
    found = _FINAL.findall(text)
    return parse_number(found[-1]) if found else None


def parse_number(text: str) -> Decimal | None:
    """A number as people write it: commas between thousands, a $, a minus sign and a full stop at the end may be there.

    None for anything else. The value is exact, whatever the number of digits.
    """
    if _WHOLE.fullmatch(text) is None:
        return None
    number = Decimal(_NO_DIGIT.sub("", text).removesuffix("."))
    # Not unary minus: arithmetic rounds to the context's 28 digits.
    return number.copy_negate() if "-" in text or "−" in text else number


def format_number(number: Decimal) -> str:
    """Plain digits, never an exponent; `parse_number` reads it back."""
    return format(number, "f")
