"""The files that come with the package: recipes and their data, tiny bases, and what starts jobs on clusters.

They are found by name, so that an installed package works alone. In a checkout, `shipped/` links to the folders that
hold them; a wheel has them as files.
"""

import difflib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from ptune_dist.errors import UserError

SHIPPED = Path(__file__).parent.parent / "shipped"
RECIPES = SHIPPED / "recipes"
BASE_PREFIX = "tiny-"  # `model.path: tiny-gpt2`
DATA_PREFIX = "recipes/data/"  # `data.train: recipes/data/dates_train.jsonl`
LAUNCHERS = ("launch", "slurm")
OWN_INSTALLERS = ("quickstart.sh", "real_base.sh", "setup.sh", "wheelhouse.sh", "constraints.txt", "gpu_check.sh")
# The config that `init` writes for a task: an offline recipe, which trains as it is.
TASKS = {
    "sentiment": "tiny/sentiment_bert",
    "question_answering": "tiny/question_answering_t5",
    "translation": "tiny/translation_t5",
    "summarization": "tiny/summarization_t5",
    "data_to_text": "tiny/data_to_text_gpt2",
    "text": "tiny/text_gpt2",
    "regression": "tiny/regression_bert",
    "instructions": "tiny/instructions_llama",
}


def find_shipped(name: Any) -> Any:
    """The path of a tiny base or of a recipe's data that is named; anything else as it is."""
    if not isinstance(name, str):
        return name
    found = None
    if name.startswith(BASE_PREFIX):
        found = SHIPPED / "tiny" / name.removeprefix(BASE_PREFIX)
    elif name.startswith(DATA_PREFIX):
        found = SHIPPED / name
    return str(found) if found is not None and os.path.exists(found) else name


def recipe_names() -> list[str]:
    """`sentiment_bert`, ..., `tiny/sentiment_bert`, ..."""
    return sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml"))


def find_recipe(path: str | Path) -> str | Path:
    """The file of the recipe that `path` names where it is no file; any other path as it is."""
    name = str(path).removesuffix(".yaml")
    return path if os.path.exists(path) or name not in recipe_names() else RECIPES / f"{name}.yaml"


def write_first_config(task: str, out: Path | None) -> Path:
    """Write the commented config of a task, or a recipe by its name, as a file that is new. Raises UserError."""
    name = TASKS.get(task, task.removesuffix(".yaml"))
    if name not in recipe_names():
        near = difflib.get_close_matches(task, [*TASKS, *recipe_names()], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"init: unknown task {task}: {hint}Tasks: {', '.join(TASKS)}; recipes: {', '.join(recipe_names())}"
        )
    out = out or Path(f"{Path(task).name.removesuffix('.yaml')}.yaml")
    if os.path.exists(out):
        raise UserError(f"init: {out} exists already: choose another file with --out")
    try:
        out.write_text((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"init: {out}: {error.strerror}") from None
    return out


def write_launcher_files(folder: Path) -> list[Path]:
    """Write the Slurm, ssh and cloud files to edit into `launch/` and `slurm/` of a folder; returns them.

    The site's file names the interpreter that runs this, in which the package is installed. Nothing is overwritten.
    Raises UserError.
    """
    sources = [
        (file, folder / top / file.relative_to(SHIPPED / top))
        for top in LAUNCHERS
        for file in sorted((SHIPPED / top).rglob("*"))
        if file.is_file() and file.name not in OWN_INSTALLERS
    ]
    there = [target for _, target in sources if os.path.exists(target)]
    if there:
        raise UserError(f"launcher-files: {there[0]} exists already: choose another folder")
    for source, target in sources:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        if target.suffix == ".sh":
            target.chmod(0o755)
    site = folder / "launch" / "site.sh"
    site.write_text(site.read_text() + f': "${{PTUNE_PYTHON:={sys.executable}}}" # has ptune_dist\n')
    return [target for _, target in sources]
