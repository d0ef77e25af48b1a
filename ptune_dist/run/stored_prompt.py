"""The trained prompt of a run: what is stored beside its tensors, and whether it fits a config and a base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ptune_dist.base.layers import name_modules, setting_of
from ptune_dist.common.progress_line import BusyLine
from ptune_dist.config.schema import Config, PromptConfig
from ptune_dist.config.sweep import ONLY_MEMBER
from ptune_dist.distributed.world import World, from_main
from ptune_dist.errors import UserError
from ptune_dist.model.value_head import TargetScale
from ptune_dist.prompts.build import check_options, find_method
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.job import Job, build_job
from ptune_dist.run.parts import base_facts
from ptune_dist.run.reading import Reading


def build_trained_job(reading: Reading, run_dir: Path, world: World) -> Job:
    """The job of a run with its trained prompt. Collective: every rank must call. Raises UserError."""
    return build_members_job(reading, {ONLY_MEMBER: run_dir}, world)


def build_members_job(reading: Reading, folders: dict[str, Path], world: World) -> Job:
    """The job of all members of a reading with their trained prompts, which are in these folders, by member.

    Collective: every rank must call. Raises UserError.
    """
    stored = from_main(world, lambda: {name: load_prompt(folder / "prompt") for name, folder in folders.items()})
    for name, (_, facts) in stored.items():
        check_prompt(replace(reading, config=reading.members[name]), facts, folders[name])
    found = {name: facts["target_scale"] for name, (_, facts) in stored.items() if facts.get("target_scale")}
    scales = {name: TargetScale(**scale) for name, scale in found.items()}
    with BusyLine(f"loading the base {reading.config.model.path}"):
        job = build_job(reading, world, with_start=False, scales=scales or None)
    for name, (_, facts) in stored.items():
        check_base(reading.config, facts, job.fingerprint, folders[name])
    job.engine.load_prompts({name: tensors for name, (tensors, _) in stored.items()})
    return job


def check_base(config: Config, facts: dict[str, Any], fingerprint: str, run_dir: Path) -> None:
    """Raise UserError where the base is not the one that a prompt was trained on."""
    trained_on = facts["base"]["fingerprint"]
    if trained_on != fingerprint:
        raise UserError(
            f"model.path: {config.model.path} is not the base that the prompt of {run_dir} was trained on "
            f"(fingerprint {fingerprint}, not {trained_on})"
        )


def check_prompt(reading: Reading, facts: dict[str, Any], run_dir: Path) -> None:
    """Raise UserError where the config has come to describe another prompt than the trained one."""
    config = reading.config
    stored_options = facts.get("options", {})
    asked_options = check_options(config.prompt).model_dump()
    asked = {key: getattr(config.prompt, key) for key in ("method", "num_virtual_tokens", "placement")}
    stored = {key: facts[key] for key in asked} | stored_options
    for key, value in (asked | asked_options).items():
        if key in stored and value != stored[key]:
            raise UserError(f"prompt.{key}: the prompt of {run_dir} was trained with {stored[key]!r}, not {value!r}")
    check_text(config.prompt, facts, run_dir)
    if facts.get("labels") not in (None, config.data.labels):
        raise UserError(f"data.labels: the head of {run_dir} was trained to tell {facts['labels']} apart")
    if facts.get("tasks") and facts["tasks"] != list(config.data.tasks or []):
        raise UserError(f"data.tasks: the prompt of {run_dir} was trained on the tasks {', '.join(facts['tasks'])}")
    objective = facts.get("objective", "cross_entropy")
    if objective != config.train.objective:
        raise UserError(
            f"train.objective: the prompt of {run_dir} was trained with {objective!r}, not {config.train.objective!r}"
        )


def check_text(prompt: PromptConfig, facts: dict[str, Any], run_dir: Path) -> None:
    """Raise UserError where the base would read other texts around a row than in training."""
    stored = facts.get("text", {"before": "", "after": ""})
    asked = describe_text(prompt)
    for where in stored:
        if asked[where] != stored[where]:
            raise UserError(
                f"prompt.text: the prompt of {run_dir} was trained with {stored[where]!r} {where} data.template, not "
                f"with {asked[where]!r}"
            )


def describe_text(prompt: PromptConfig) -> dict[str, str]:
    """What the base reads before and after data.template."""
    return {"before": prompt.around.head(), "after": prompt.around.tail()}


def prompt_facts(job: Job, member: str, *, step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """What is stored beside a prompt's tensors."""
    config = job.members[member]
    model = job.engine.model
    family = job.reading.family
    text = model.base.config.get_text_config()
    facts = {
        "method": config.prompt.method,
        "num_virtual_tokens": config.prompt.num_virtual_tokens,
        "width": base_facts(model.base).width,
        "placement": config.prompt.placement,
        "text": describe_text(config.prompt),
        "step": step,
        "validation": metrics,
        "labels": config.data.labels if family.trains_head else None,
        "base": {
            "path": config.model.path,
            "family": family.name,
            "model_type": model.base.config.model_type,
            "fingerprint": job.fingerprint,
            # for PEFT's adapter_config.json; a state-space model has no heads
            "num_layers": getattr(text, "num_hidden_layers", None),
            "num_attention_heads": setting_of(text, "num_attention_heads"),
        },
    }
    if job.longest_target is not None:
        facts["longest_target"] = job.longest_target
    if find_method(config.prompt).names_modules:
        facts["modules"] = name_modules(model.base)
    if config.data.tasks and find_method(config.prompt).has_tasks:
        facts["tasks"] = list(config.data.tasks)
    options = check_options(config.prompt).model_dump()
    if options:
        facts["options"] = options
    settled = job.prompts[member].settled_options()
    if settled:
        facts["settled_options"] = settled
    if model.predicts_numbers:
        scale = model.target_scales[list(job.members).index(member)]
        facts["objective"] = config.train.objective
        facts["target_scale"] = {"mean": scale.mean, "std": scale.std}
    return facts


def prompt_tensors(job: Job, member: str) -> dict[str, torch.Tensor]:
    """What is stored of a prompt: all that was trained, and the plain prompt that it amounts to."""
    number = list(job.members).index(member)
    plain = job.engine.model.prompt(number).plain()
    stored = {name: tensor.float().cpu().clone() for name, tensor in plain.items()}
    return job.engine.prompt_tensors(member) | stored
