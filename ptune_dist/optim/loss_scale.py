"""The loss scale of fp16 training: static, or dynamic by the rule of DeepSpeed's section `fp16`.

Small gradients vanish in float16, so the loss is multiplied by a scale before backward and gradients are divided by it
afterwards. A dynamic scale is halved when a gradient overflows and doubled after `loss_scale_window` steps without one.
Names and meaning are those of https://www.deepspeed.ai/docs/config-json/#fp16-training-options
"""

from typing import Any

FACTOR = 2.0
STATIC_KEYS = ("cur_scale",)
DYNAMIC_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """The scale and what it depends on. Attributes with `cur` and `last` are stored in checkpoints by these names."""

    def __init__(self, fp16: dict[str, Any]):
        """`fp16` is that section of DeepSpeed's JSON; `loss_scale: 0`, the default, is a dynamic scale."""
        static = float(fp16.get("loss_scale", 0))
        self.is_dynamic = static == 0
        self.window = int(fp16.get("loss_scale_window", 1000))
        self.hysteresis = int(fp16.get("hysteresis", 2))
        self.refills_hysteresis = bool(fp16.get("consecutive_hysteresis", False))
        self.min_scale = float(fp16.get("min_loss_scale", 1))
        self.cur_scale = 2.0 ** int(fp16.get("initial_scale_power", 16)) if self.is_dynamic else static
        self.cur_iter = 0
        self.last_overflow_iter = -1
        self.cur_hysteresis = self.hysteresis

    @property
    def is_exhausted(self) -> bool:
        """Whether another overflow cannot lower the scale: then it is the numbers that are at fault."""
        return self.is_dynamic and self._falls_next and self.cur_scale <= self.min_scale

    @property
    def _falls_next(self) -> bool:
        """Whether the next overflow lowers the scale; the first `hysteresis` - 1 are tolerated."""
        return self.hysteresis == 1 or self.cur_hysteresis == 1

    def count_step(self, has_overflow: bool) -> None:
        """Adjust a dynamic scale after a step."""
        if not self.is_dynamic:
            return
        if has_overflow:
            if self._falls_next:
                self.cur_scale = max(self.cur_scale / FACTOR, self.min_scale)
            else:
                self.cur_hysteresis -= 1
            self.last_overflow_iter = self.cur_iter
        else:
            self._count_sound_step()
        self.cur_iter += 1

    def _count_sound_step(self) -> None:
        if self.refills_hysteresis:
            self.cur_hysteresis = self.hysteresis
        num_sound = self.cur_iter - self.last_overflow_iter - 1
        if num_sound > 0 and num_sound % self.window == 0:
            self.cur_hysteresis = self.hysteresis
            self.cur_scale *= FACTOR

    def state(self) -> dict[str, float]:
        """The numbers that an exact resume needs."""
        keys = DYNAMIC_KEYS if self.is_dynamic else STATIC_KEYS
        return {key: getattr(self, key) for key in keys}

    def load_state(self, state: dict[str, float]) -> None:
        """Set what `state` gave; a static scale stays the JSON's."""
        if self.is_dynamic:
            for key in DYNAMIC_KEYS:
                setattr(self, key, state.get(key, getattr(self, key)))


def build_loss_scale(content: dict[str, Any]) -> LossScale | None:
    """The loss scale that DeepSpeed's JSON asks for; None in other precisions."""
    fp16 = content.get("fp16", {})
    return LossScale(fp16) if fp16.get("enabled") else None
