"""JSON files: read or refused, whole or absent."""

import pytest

from harmonic.errors import UserError
from harmonic.files import read_json, refusing, write_json


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"b": [1, 2.5, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"b": [1, 2.5, None]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\xff", b"[" * 100_000], ids=str)
def test_a_file_that_is_no_json_is_none_or_refused(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path) is None
    said = "is missing; make it again" if content is None else r"cannot be read as JSON \(.+\); make it again"
    with pytest.raises(UserError, match=f"a.json {said}$") as caught:
        read_json(path, remedy="make it again")
    assert "\n" not in str(caught.value)


def test_only_named_errors_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^x cannot be read \(why, at length\); mend it$"):
        with refusing("x", "mend it", KeyError, ValueError):
            raise ValueError("why,\n at length")
    with pytest.raises(TypeError), refusing("x", "mend it", ValueError):
        raise TypeError
