"""Checkpointed layers give the same loss and gradients in less memory, with every setting of DeepSpeed's JSON."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.cache_utils import Cache, CacheLayerMixin

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import DEFAULTS, SECTION, Recomputer, Slots, read_settings
from tests.base.bases import IDS, error_of, load, rewrite_shape
from tests.conftest import LABELS

KINDS = ["llama", "gpt2", "t5", "bart", "bert"]
SETTINGS = [
    {},
    {"partition_activations": True},
    {"cpu_checkpointing": True},
    {"contiguous_memory_optimization": True, "number_checkpoints": 4},
    {"profile": True, "synchronize_checkpoint_boundary": True},
]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def checkpoint_layers(base, section: dict) -> Recomputer:
    layers = layers_of(base)
    return Recomputer(read_settings({SECTION: section}, len(layers), "ds.json"), layers)


def loss_of(base, vectors: torch.Tensor, **inputs) -> torch.Tensor:
    if base.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": IDS, "use_cache": False}
    logits = base(inputs_embeds=vectors, **inputs).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % logits.shape[-1])


def loss_and_gradient(base, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = vectors.clone().requires_grad_()
    loss = loss_of(base, vectors)
    loss.backward()
    return loss.detach(), vectors.grad


def assert_close(found, wanted, most: float = 1e-6) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= most * other.abs().max() and other.abs().max() > 0


# Loss and gradients


@pytest.mark.parametrize("section", SETTINGS, ids=lambda section: " ".join(section) or "none")
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_without_checkpoints(tiny_bases, kind, section):
    plain, checkpointed = (load(tiny_bases[kind], labels=LABELS) for _ in range(2))
    recomputer = checkpoint_layers(checkpointed, section)
    assert recomputer.num_layers == (4 if kind in ("t5", "bart") else 2) and not checkpointed.training
    for seed in range(2):  # the second step reuses what the first left
        vectors = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(seed))
        assert_close(loss_and_gradient(checkpointed, vectors), loss_and_gradient(plain, vectors))


class Context(CacheLayerMixin):
    """A context's keys and values [B, H, T, D / H] before the new ones; nothing is stored."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None:
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1


@pytest.mark.parametrize("section", SETTINGS, ids=lambda section: " ".join(section) or "none")
@pytest.mark.parametrize("kind, num_heads", [("llama", 2), ("gpt2", 4), ("qwen2", 2)])
def test_keys_and_values_that_are_passed_in_are_used_and_get_their_gradients(tiny_bases, kind, num_heads, section):
    numbers = [torch.randn(2, num_heads, 5, 8) for _ in range(4)]
    vectors = torch.randn(2, 6, 32)
    found = []
    for with_checkpoints in (False, True):
        base = load(tiny_bases[kind])
        if with_checkpoints:
            checkpoint_layers(base, section)
        given = [tensor.clone().requires_grad_() for tensor in (vectors, *numbers)]
        cache = Cache(layers=[Context(*given[1:3]), Context(*given[3:])])
        loss = loss_of(base, given[0], past_key_values=cache, attention_mask=torch.ones(2, 11), use_cache=True)
        found.append([loss.detach(), *torch.autograd.grad(loss, given)])
    assert_close(found[1], found[0])
    alone = loss_and_gradient(load(tiny_bases[kind]), vectors)
    assert (alone[0] - found[0][0]).abs() > 1e-3  # the context matters


def test_nothing_is_recomputed_where_there_is_no_gradient(tiny_bases):
    base = load(tiny_bases["llama"])
    recomputer = checkpoint_layers(base, {"profile": True})
    with torch.no_grad():
        loss_of(base, torch.randn(2, 6, 32))
    assert recomputer.describe_profile() == []


# Memory


def saved_bytes(base, vectors: torch.Tensor) -> int:
    """Bytes that a forward saves for backward, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in [*base.parameters(), *base.buffers()]}
    saved: dict[int, int] = {}
    kept = []  # so that no address is reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(base, vectors.requires_grad_())
    return sum(saved.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_what_is_kept_for_backward_grows_by_one_hidden_state_a_layer(tiny_bases, tmp_path, kind):
    content = (tiny_bases[kind] / "config.json").read_text()
    (tmp_path / "config.json").write_text(content)
    growth = {}
    vectors = torch.randn(4, 60, 32)
    for with_checkpoints in (False, True):
        sizes = []
        for num_layers in (2, 6):
            rewrite_shape(tmp_path, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": num_layers})
            base = load(tmp_path, random_init=True, labels=LABELS)
            if with_checkpoints:
                checkpoint_layers(base, {})
            sizes.append(saved_bytes(base, vectors.clone()))
        growth[with_checkpoints] = (sizes[1] - sizes[0]) / 4
    assert growth[True] <= 1.05 * vectors.nbytes
    assert growth[False] >= 8 * vectors.nbytes


def test_contiguous_checkpoints_share_one_buffer():
    slots = Slots(3)
    tensors = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
    packed = [slots.put(tensor) for tensor in tensors]
    found = [slots.take(one) for one in packed]
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


def test_what_fits_no_slot_stays_as_it_is():
    slots = Slots(2)
    first = torch.randn(6, requires_grad=True)
    packed = [slots.put(first)]
    others = [torch.ones(6, dtype=torch.long), torch.randn(6), torch.randn(7, requires_grad=True)]
    others.append(torch.randn(6, dtype=torch.float64, requires_grad=True))
    assert all(slots.take(slots.put(other)) is other for other in others)
    packed.append(slots.put(first * 2))
    last = torch.randn(6, requires_grad=True)
    assert slots.put(last) is last  # all slots are taken
    assert torch.equal(slots.take(packed[0]), first) and torch.equal(slots.take(packed[1]), first * 2)
    packed.clear()
    longer = torch.randn(9, requires_grad=True)
    assert slots.put(longer) is not longer  # a longer batch makes room once all are free


def test_a_graph_that_is_walked_twice_frees_its_slots_once(tiny_bases):
    plain = load(tiny_bases["llama"])
    checkpointed = load(tiny_bases["llama"])
    checkpoint_layers(checkpointed, {"contiguous_memory_optimization": True, "number_checkpoints": 2})
    loss = loss_of(checkpointed, torch.randn(2, 6, 32).requires_grad_())
    loss.backward(retain_graph=True)
    loss.backward()
    several = [torch.randn(2, 6, 32).requires_grad_() for _ in range(2)]
    for loss in [loss_of(checkpointed, vectors) for vectors in several]:
        loss.backward()
    for vectors in several:
        assert_close([vectors.grad], loss_and_gradient(plain, vectors.detach())[1:])


def test_a_graph_that_is_dropped_frees_its_slots():
    slots = Slots(2)
    for _ in range(3):
        packed = [slots.put(torch.randn(4, requires_grad=True)) for _ in range(2)]
        found = [slots.take(one) for one in packed]
        assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
        del packed, found


# The profile


def test_the_profile_has_a_line_for_each_layer(tiny_bases):
    base = load(tiny_bases["t5"])
    recomputer = checkpoint_layers(base, {"profile": True})
    for _ in range(3):
        loss_and_gradient(base, torch.randn(2, 6, 32))
    lines = recomputer.describe_profile()
    assert [line.split(": ")[0] for line in lines] == [f"activation checkpoint {number}" for number in range(4)]
    for line in lines[:2] + lines[3:]:  # the decoder's first layer reads tokens: no gradient arrives at its input
        _, _, forward, _, _, backward, *_ = line.split()[2:]
        assert float(forward) > 0 and float(backward) > 0
        assert line.endswith("(mean of 3)")


def test_no_profile_is_none(tiny_bases):
    base = load(tiny_bases["llama"])
    recomputer = checkpoint_layers(base, {})
    loss_and_gradient(base, torch.randn(2, 6, 32))
    assert recomputer.describe_profile() == []


# The section


def read(section, num_layers: int = 2):
    return read_settings({SECTION: section}, num_layers, "ds.json")


def test_settings_are_deepspeeds_defaults_where_left_out():
    assert read_settings({}, 2, "ds.json") is None
    assert read({}) == DEFAULTS
    assert read({"profile": True, "number_checkpoints": 3}) == DEFAULTS | {"profile": True, "number_checkpoints": 3}


def test_an_unknown_field_is_named_with_those_that_are_known():
    message = error_of(read, {"profle": True}, starts=f"ds.json: {SECTION}.profle ")
    assert all(name in message for name in DEFAULTS)


@pytest.mark.parametrize("name", [name for name, default in DEFAULTS.items() if default is not None])
@pytest.mark.parametrize("value", [1, "true", None, []])
def test_a_switch_of_another_kind_is_named(name, value):
    error_of(read, {name: value}, starts=f"ds.json: {SECTION}.{name} is {value!r}")


@pytest.mark.parametrize("value", ["4", True, 2.5])
def test_a_number_of_another_kind_is_named(value):
    error_of(read, {"number_checkpoints": value}, starts=f"ds.json: {SECTION}.number_checkpoints is {value!r}")


@pytest.mark.parametrize("number", [-1, 0, 3])
def test_fewer_checkpoints_than_layers_are_refused_with_their_number(number):
    message = error_of(read, {"number_checkpoints": number}, 4, starts="ds.json: ")
    assert f"number_checkpoints is {number}" in message and "4 layers" in message


def test_contiguous_memory_needs_the_number_of_checkpoints_and_stays_on_the_gpu():
    message = error_of(read, {"contiguous_memory_optimization": True}, 4, starts="ds.json: ")
    assert "needs number_checkpoints: 4" in message
    both = {"contiguous_memory_optimization": True, "number_checkpoints": 4, "cpu_checkpointing": True}
    assert "exclude each other" in error_of(read, both, 4, starts="ds.json: ")
