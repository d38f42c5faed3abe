import pytest

from stages.generation.protocol import Request
from stages.generation.requests import spread


@pytest.mark.parametrize(("size", "expected"), [(1, "0"), (2, "03"), (3, "024"), (6, "012345"), (9, "012345")])
def test_a_part_of_the_prompts_comes_from_all_places(size: int, expected: str) -> None:
    requests = [Request(str(index), (1,), seed=0) for index in range(6)]

    assert "".join(request.prompt_id for request in spread(requests, size)) == expected
