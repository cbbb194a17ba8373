"""What a worker that cannot start leaves for Kubernetes: a sentence and an exit status."""

import pytest

from tilefleet_worker import termination
from tilefleet_worker.config import parse_args
from tilefleet_worker.errors import EngineError, ModelError
from tilefleet_worker.server.serve import serve


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "termination-log"
    monkeypatch.setattr(termination, "PATH", path)
    return path


def run(*flags):
    """Serve in this process; the flags must make it fail before an engine is built."""
    config = parse_args(["--host", "127.0.0.1", "--port", "0", "--admin-port", "0", *flags])
    return serve(config)


def test_missing_model_is_named_with_status_three(log):
    log.touch()
    assert run("--model", "/nowhere") == 3
    assert log.read_text() == (
        "ModelError: model '/nowhere': the folder /nowhere does not exist; give the folder that"
        " holds config.json"
    )


def test_wrong_configuration_has_status_two(log):
    log.touch()
    assert run("--model", "s3://bucket/model") == 2
    assert log.read_text().startswith("ConfigError: 's3://bucket/model' has the unknown scheme")


def test_wrong_flag_is_named(log):
    log.touch()
    with pytest.raises(SystemExit):
        parse_args(["--model", "x", "--block-size", "0"])
    assert log.read_text().startswith("ConfigError: argument --block-size: ")


def test_outside_kubernetes_no_file_is_made(log):
    termination.write(ModelError("x"))
    assert not log.exists()


def test_message_is_one_short_line_that_replaces_what_was_there(log):
    log.write_text("x" * 4000)
    termination.write(EngineError("first\n  second " + "y" * 5000))
    text = log.read_text()
    assert text.startswith("EngineError: first second yyy")
    assert len(text) == 1000
