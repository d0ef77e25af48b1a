"""Values that nobody can mean are refused in one line that tells what to write."""

from pathlib import Path

import pytest

from ptune_dist.config.deepspeed_json import fill_deepspeed_json
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from tests.commands import Commands
from tests.conftest import write_config

HUGE = "1000000000"
REFUSED = {
    f"prompt.num_virtual_tokens={HUGE}": "at most 100,000",
    f"train.batch_size={HUGE}": "at most 10,000,000",
    f"data.max_length={HUGE}000": "at most",
    f"train.micro_batch_tokens={HUGE}000": "at most",
    f"evaluate.num_samples={HUGE}000": "at most",
    f"evaluate.max_new_tokens={HUGE}000": "at most",
    f"checkpoint.keep={HUGE}000": "at most",
    "data.cache_dir=on": "a folder is needed, or off",
    "train.context_cache_dir=true": "a folder is needed, or off",
    "evaluate.metrics=[loss, loss]": "'loss' is listed twice",
    "output_dir=${oc.env:HOME}/x": r"\$\{oc.env:HOME\} is not filled in here",
    "model.path=$HOME/base": r"\$HOME is not filled in here",
    "data.train=${data}/t.jsonl": "is not filled in here",
    "data.validation=$(pwd)/t.jsonl": "is not filled in here",
    "deepspeed=${DS}": "is not filled in here",
    "data.cache_dir=${TMPDIR}": "is not filled in here",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_value_is_refused_in_one_line(override: str, tmp_path: Path):
    path = write_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match=rf"^command line: {override.partition('=')[0]}: .*{REFUSED[override]}"):
        load_config(path, [override])


@pytest.mark.parametrize("word", ["off", "false", "no", "No", "none", "null", "OFF"])
def test_caches_are_turned_off_by_what_people_write_for_it(word: str, tmp_path: Path):
    path = write_config(tmp_path / "c.yaml")
    given = [f"{key}={word}" for key in ("data.cache_dir", "train.context_cache_dir")]
    config = load_config(path, given)
    assert config.data.cache_dir is None and config.train.context_cache_dir is None
    path.write_text(path.read_text().replace('"max_length"', f'"cache_dir": {word}, "max_length"'))
    assert load_config(path).data.cache_dir is None


def test_a_folder_whose_name_has_a_dollar_may_be_used_once_it_is_there(tmp_path: Path):
    (tmp_path / "$x").mkdir()
    path = write_config(tmp_path / "c.yaml")
    assert load_config(path, [f"output_dir={tmp_path}/$x"]).output_dir == f"{tmp_path}/$x"


def test_a_key_with_dots_in_a_file_is_told_how_to_be_written(tmp_path: Path):
    path = write_config(tmp_path / "c.yaml", **{"prompt.num_virtual_tokens": 4})
    with pytest.raises(UserError, match=r"write num_virtual_tokens indented below prompt:, or prompt.num_virt.*=VALUE"):
        load_config(path)


def test_a_switch_is_no_number_of_deepspeeds_json(tmp_path: Path):
    path = write_config(tmp_path / "c.yaml")
    config = load_config(path, ["deepspeed={gradient_clipping: true}", "train.max_grad_norm=1.0"])
    with pytest.raises(UserError, match="gradient_clipping is true"):
        fill_deepspeed_json(config, hidden_size=8)
    config = load_config(path, ["deepspeed={gradient_clipping: 1}", "train.max_grad_norm=1.0"])
    fill_deepspeed_json(config, hidden_size=8)


def test_a_prompt_that_does_not_fit_in_memory_is_one_line(commands: Commands, tmp_path: Path):
    given = ["prompt.method=p_tuning", "prompt.encoder_hidden_size=4000000000"]
    done = commands.run("validate", write_config(tmp_path / "c.yaml"), *given)
    assert done.code == 2 and "4 virtual tokens of p_tuning, with its options, do not fit" in done.errors[0]
