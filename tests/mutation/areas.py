"""The code whose tests are tested, and which tests are to find a fault in it, the quickest first."""

from typing import NamedTuple


class Area(NamedTuple):
    """What is made faulty, and what finds it.

    code: paths from the repository's root; one that ends in / stands for the files in the folder. tests: arguments of
    pytest. given: faults beside the drawn ones, (path, text, what replaces it).
    """

    code: tuple[str, ...]
    tests: tuple[str, ...]
    given: tuple[tuple[str, str, str], ...] = ()


RENAME_FIRST = "temporary.touch(); os.replace(temporary, path); return write_durably(path, data)"
WRITE_UNFLUSHED = "(folder / f'{name}.safetensors').write_bytes(data)"
FILES = "ptune_dist/common/files.py"
CHECKPOINT = "ptune_dist/run/checkpoint.py"
DURABILITY = "tests/durability/test_durability.py"
WITHOUT_TRAINING = f"--deselect={DURABILITY}::test_a_whole_training_keeps_what_it_has_announced"
MODEL = "ptune_dist/model"
SEGMENTS = "tests/numerics/test_segments.py"
LABELS = "tests/numerics/test_labels.py"

AREAS = {
    "files": Area(
        (FILES,),
        ("tests/common/test_files.py", DURABILITY, WITHOUT_TRAINING),
        (
            (FILES, "        os.fsync(handle)", "        pass"),
            (FILES, "        flush(file.fileno())\n\n\ndef replace_file", "        pass\n\n\ndef replace_file"),
            (FILES, "        flush(handle)", "        pass"),
            (FILES, "        replace()\n    sync_folder(path.parent)", "        replace()"),
            (
                FILES,
                "        path.mkdir(exist_ok=True)\n        sync_folder(path.parent)",
                "        path.mkdir(exist_ok=True)",
            ),
            (FILES, "write_durably(temporary, data)", RENAME_FIRST),
            (FILES, 'path.with_name(f".writing-{path.name}")', "path"),
        ),
    ),
    "checkpoint": Area(
        (CHECKPOINT,),
        (
            "tests/run/test_checkpoint.py",
            f"{DURABILITY}::test_a_checkpoint_is_flushed_as_a_whole_before_it_gets_its_name_and_before_an_older_one_goes",
            "--deselect=tests/run/test_checkpoint.py::test_a_writer_killed_at_any_moment_leaves_a_sound_newest_checkpoint",
        ),
        (
            (CHECKPOINT, "        try_again(write)\n        sync_folder(folder)", "        try_again(write)"),
            (CHECKPOINT, "    sync_folder(folder)\n\n\ndef render_snapshot", "\n\ndef render_snapshot"),
            (CHECKPOINT, "write_durably(folder / name, data)", WRITE_UNFLUSHED),
            (
                CHECKPOINT,
                "        write_snapshot(temporary, snapshot)\n",
                "        temporary.rename(final)\n        write_snapshot(final, snapshot)\n        return\n",
            ),
            (CHECKPOINT, "if path <= newest", "if True"),
        ),
    ),
    "metrics": Area(
        ("ptune_dist/metrics/",),
        ("tests/metrics",),
        (
            ("ptune_dist/metrics/text.py", "answer in accepted", "answer.lower() in [a.lower() for a in accepted]"),
            ("ptune_dist/metrics/text.py", "Counter(words) & Counter(wanted)", "Counter(words) | Counter(wanted)"),
            ("ptune_dist/metrics/likelihood.py", "sum(row.num_tokens for row in rows)", "len(rows)"),
        ),
    ),
    "optimizer": Area(
        ("ptune_dist/optim/",),
        (
            *(f"tests/optim/test_{name}.py" for name in ("loss_scale", "optimizer", "prompt_state", "gradients")),
            "tests/config/test_deepspeed_schedules.py",
        ),
        (
            ("ptune_dist/optim/prompt_state.py", "norm[None] for norm in norms", "norms[0][None] for _ in norms"),
            ("ptune_dist/optim/optimizer.py", "step <= train.num_warmup_steps", "step < train.num_warmup_steps"),
        ),
    ),
    "head": Area(
        (f"{MODEL}/head.py", f"{MODEL}/from_head.py"),
        ("tests/numerics/test_head.py", "-m", "not long"),
    ),
    "layout": Area(
        (f"{MODEL}/layout.py", f"{MODEL}/packing.py"),
        ("tests/model/test_layout.py", SEGMENTS, "-k", "layout or (llama and not template)"),
    ),
    "attention": Area(
        (
            f"{MODEL}/attention.py",
            f"{MODEL}/attention_contexts.py",
            f"{MODEL}/attention_products.py",
            f"{MODEL}/attention_trees.py",
        ),
        (
            "tests/numerics/test_attention.py",
            "tests/architectures/test_found.py",
            SEGMENTS,
            LABELS,
            "-k",
            "attention or window or bart",
        ),
    ),
    "resume": Area(
        ("ptune_dist/run/folder.py", "ptune_dist/run/progress.py"),
        ("tests/run/test_progress.py", "tests/run/test_folder.py"),
    ),
}
