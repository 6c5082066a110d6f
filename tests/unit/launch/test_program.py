import pytest

from gqa_parallel.errors import UserError
from gqa_parallel.launch.program import end_with


def ends(error: Exception) -> None:
    with pytest.raises(SystemExit) as end:
        end_with(error)
    assert end.value.code == 2


def test_the_first_rank_of_a_node_to_fail_prints_the_message(tmp_path, monkeypatch, capsys):
    for local_rank in (1, 0):
        folder = tmp_path / "attempt_0" / str(local_rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        ends(UserError(f"from {local_rank}"))
    assert capsys.readouterr().err == "\nerror: from 1\n"


def test_a_message_is_printed_where_the_ranks_share_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    ends(UserError("once"))
    assert capsys.readouterr().err == "\nerror: once\n"


def test_the_cause_of_a_user_error_is_not_repeated(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    error = UserError("run_dir (x) must be a folder")
    error.__cause__ = OSError("[Errno 17] File exists")
    ends(error)
    assert capsys.readouterr().err == "\nerror: run_dir (x) must be a folder\n"
