from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.answers import find_answer, format_number, parse_number

numbers = st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**30), max_value=10**30)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### 72.0", "72"),
        ("#### 0072", "72"),
        ("#### 72.", "72"),
        ("####72 \r\nDone.", "72"),
        ("So #### $1,234.50", "1234.5"),
        ("#### -$5", "-5"),
        ("#### $-.5.", "-0.5"),
        ("#### −5", "-5"),
        ("#### 1\n#### 2", "2"),
        ("#### 1\n#### two", "1"),
        ("#### 0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    ],
)
def test_the_last_number_after_the_mark_is_the_answer(text: str, answer: str) -> None:
    assert find_answer(text) == Decimal(answer)


@pytest.mark.parametrize(
    "text",
    [
        *("", "72", "### 72", "##### 72", "####", "#### seventy", "#### \n72", "#### $", "#### .", "#### -"),
        *("#### 72 clips", "#### 1 or 2", "#### 3/4", "#### 1e3", "#### 5%", "#### --5", "#### 72..", "#### ٣"),
        *("#### 1,5", "#### 12,34", "#### 1,0000", "#### ,100", "#### 1.234,5"),
    ],
)
def test_what_is_not_clearly_one_number_is_no_answer(text: str) -> None:
    assert find_answer(text) is None


@given(number=numbers, before=st.text())
def test_however_a_number_is_written_it_is_the_same_answer(number: Decimal, before: str) -> None:
    for written in (f"{number}", f"{number:,f}", f"{number:f}00", f"{number:f}."):
        assert find_answer(f"{before}\n#### {written}") == number


@given(number=numbers)
def test_a_written_number_is_read_back_to_the_last_digit(number: Decimal) -> None:
    assert parse_number(format_number(number)) == number
    assert parse_number("1" + "0" * 5000) == Decimal(10) ** 5000


@given(text=st.text(alphabet="#0123456789.,-$ \n", max_size=60))
def test_no_text_makes_it_fail(text: str) -> None:
    answer = find_answer(text)

    assert answer is None or answer.is_finite()
