"""Options from files, from texts and from the command line."""

from __future__ import annotations

from dataclasses import fields

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.cli.options import resolve, training_options
from fastload.errors import DataError, UsageError
from fastload.train.config import Config, parse_sets

EVERYTHING = Config(
    model="test_vit", lr=1e-5, milestones=(3.0, 5.5), schedule="multi_step", track=("wandb",), flip=False, start_size=None,
    threads=3, groups="person+parent",
)  # fmt: skip


def test_a_file_and_back(tmp_path):
    EVERYTHING.save(tmp_path / "c.yaml")
    assert Config.load(tmp_path / "c.yaml") == EVERYTHING
    assert set(yaml.safe_load((tmp_path / "c.yaml").read_text())) == {spec.name for spec in fields(Config)}


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.floats(1e-12, 10), "epochs": st.integers(1, 10**6), "flip": st.booleans(), "min_lr": st.floats(0, 0.999),
            "milestones": st.lists(st.floats(0, 1e6), max_size=4).map(tuple), "threads": st.none() | st.integers(1, 99),
            "groups": st.sampled_from(["none", "auto", "true", "1", "null", "person"]),
            "data": st.none() | st.text("abc/.é:# '\"", min_size=1),
        },
    )
)  # fmt: skip
def test_any_values_survive_the_file(tmp_path_factory, values):
    cfg = Config(**values)
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    cfg.save(path)
    assert Config.load(path) == cfg


def test_numbers_that_yaml_reads_as_text(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "lr: 1e-3\nweight_decay: 5E-2\nmilestones: [1e1, 20]\nschedule: multi_step\n"
    )
    cfg = Config.load(tmp_path / "c.yaml")
    assert (cfg.lr, cfg.weight_decay, cfg.milestones) == (1e-3, 0.05, (10.0, 20))


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("learning_rate: 1", UsageError, "learning_rate"),
        ("epoch: 3", UsageError, "did you mean 'epochs'"),
        ("epochs: many", UsageError, "'many'"),
        ("- a\n- b", DataError, "list"),
        ("a: [", DataError, "YAML"),
        ("", DataError, "NoneType"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, error, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(error, match=words):
        Config.load(tmp_path / "c.yaml")


def test_no_such_file_and_no_text(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        Config.load(tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises((UsageError, DataError)):
        Config.load(tmp_path / "c.yaml")


def test_texts_are_read_as_the_options_kind():
    cfg = Config().with_values(
        {
            "lr": "1e-4",
            "epochs": "7",
            "flip": "false",
            "threads": "none",
            "milestones": "3,5",
            "groups": "none",
        }
    )
    assert (cfg.lr, cfg.epochs, cfg.flip, cfg.threads, cfg.milestones) == (1e-4, 7, False, None, (3.0, 5.0))
    assert cfg.groups == "none"  # a word here, not nothing
    with pytest.raises(UsageError, match=r"epochs.*'7.5'"):
        Config().with_values({"epochs": "7.5"})
    with pytest.raises(UsageError, match="label_smoothing"):
        Config().with_values({"label_smooth": "0"})


def test_sets():
    assert parse_sets(["lr=1", "groups = a=b"]) == {"lr": "1", "groups": "a=b"}
    with pytest.raises(UsageError, match="key=value"):
        parse_sets(["lr"])


def test_the_line_wins_over_set_and_set_over_the_file(tmp_path):
    Config(epochs=5, lr=0.1, seed=1).save(tmp_path / "c.yaml")
    cfg = resolve({"epochs": 9, "lr": None}, str(tmp_path / "c.yaml"), ["lr=0.2", "epochs=8"])
    assert (cfg.epochs, cfg.lr, cfg.seed) == (9, 0.2, 1)


def test_every_option_can_be_given_on_the_line():
    got = {}

    @click.command()
    @training_options()
    def command(config_file, sets, **options):
        got.update(resolve(options, config_file, sets).to_dict())

    line = []
    for spec in fields(Config):
        if getattr(EVERYTHING, spec.name) == spec.default:
            continue
        value = getattr(EVERYTHING, spec.name)
        if value is False:
            line.append(f"--no-{spec.name}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            line += [f"--{spec.name.replace('_', '-')}", text]
    result = CliRunner().invoke(command, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert Config.from_dict(got) == EVERYTHING


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schedule": "multi_step"}, "milestones"), ({"start_size": 300}, "at most size"), ({"schedule": "cos"}, "cosine"),
        ({"pretrained": True, "weights": "a.pt"}, "exclude"), ({"valid": "a", "split": "b"}, "exclude"),
        ({"track": ("mlflow",)}, "tensorboard, wandb"), ({"metric": "macro_f"}, "macro_f1"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(values, words):
    with pytest.raises(UsageError, match=words):
        Config(**values)


def test_growing_images():
    cfg = Config(epochs=11, size=224, start_size=128)
    sizes = [cfg.size_at(e) for e in range(11)]
    assert sizes[0] == 128 and sizes[7:] == [224] * 4
    assert sizes == sorted(sizes) and all(s % 32 == 0 for s in sizes)
    assert [Config(size=100).size_at(e) for e in (0, 5)] == [100, 100]
    assert Config(epochs=1, size=64, start_size=32).size_at(0) == 32
