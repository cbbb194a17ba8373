"""Flags: sizes, durations, unknown ones, and a config without any auto."""

import dataclasses

import pytest

from tilefleet_worker.config import (
    ServeConfig,
    engine_config,
    parse_args,
    parse_duration,
    parse_quantity,
    parser,
    resolve,
    usable_cpus,
)
from tilefleet_worker.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("256Mi", 2**28),
        ("1.5Gi", 3 * 2**29),
        ("2G", 2 * 10**9),
        ("1e6", 10**6),
        ("5000m", 5),
    ],
)
def test_quantities(text, expected):
    assert parse_quantity(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1 GB", "Mi", "1m", "999m", "0.1", "1e999999999Gi", "nan"]
)
def test_bad_quantities_are_refused(text):
    with pytest.raises(ConfigError):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("300s", 300), ("5m", 300), ("1h30m", 5400), ("250ms", 0.25), ("2.5", 2.5), ("0s", 0)],
)
def test_durations(text, expected):
    assert parse_duration(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "s", "5 m", "-1s", "1d", "5m x"])
def test_bad_durations_are_refused(text):
    with pytest.raises(ConfigError):
        parse_duration(text)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--modle", "x"],
        ["--mod", "x"],
        ["--model", ""],
        ["--model", "x", "--port", "65536"],
        ["--model", "x", "--block-size", "0"],
        ["--model", "x", "--backend", "gpu"],
        ["--model", "x", "--kv-cache-memory", "lots"],
        ["--model", "x", "extra"],
    ],
)
def test_wrong_flags_end_with_status_two(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(flags)
    assert caught.value.code == 2
    assert "--help" in capsys.readouterr().err


def test_every_field_has_a_flag_and_a_help_text():
    text = " ".join(parser().format_help().split())
    for field in dataclasses.fields(ServeConfig):
        assert field.metadata["flag"] in text
        assert " ".join(field.metadata["help"].split()[:3]) in text


def test_config_is_frozen_and_resolves_without_auto():
    config = parse_args(["--model", "hf://acme/tiny@v1", "--drain-timeout", "5m"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1
    resolved = resolve(config, engine_config(config, num_cpus=3).resolve(model_max_len=512))
    assert resolved.served_model_name == "acme/tiny"
    assert (resolved.max_model_len, resolved.threads) == (512, 3)
    assert "auto" not in dataclasses.asdict(resolved).values()
    assert (resolved.kv_cache_memory, resolved.block_size) == (256 * 2**20, 16)
    pointless = ["--model", "/m", "--kv-offloading-size", "1Gi", "--no-prefix-caching"]
    with pytest.raises(ConfigError, match="nothing to keep"):
        engine_config(parse_args(pointless), num_cpus=3)
    again = engine_config(resolved, num_cpus=8).resolve(model_max_len=512)
    assert resolve(resolved, again) == resolved


@pytest.mark.parametrize(
    ("model", "name"),
    [("/models/a/", "a"), ("file:///models/b", "b"), ("pvc://c/d@1", "d@1"), ("x", "x")],
)
def test_model_name_is_the_last_part(model, name):
    assert parse_args(["--model", model]).model_name() == name


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.max": "broken"}, 8),
        ({}, 8),
    ],
)
def test_threads_follow_the_cgroup(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(8, tmp_path) == expected
