"""Whether a rank waits for other ranks, judged by the stacks that its fault handler has written.

When the heartbeats of all ranks have stopped, one rank is the cause and the others wait for it. On a CPU a rank waits
in the collective itself. On a GPU a collective returns at once, and the rank waits wherever it next reads a result of
the GPU, or launches a kernel while the queue of kernels is full: in nearly any operation of torch. There a backward
pass also runs in a thread of autograd's, which appears in the stacks without the frames of Python's threading.
"""

import linecache
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

# Code in which a rank waits for other ranks: in a collective, or on a GPU in the first read of its result.
WAITING_CODE = ("/torch/distributed/", "/torch/cuda/", "/deepspeed/runtime/", "/ptune_dist/distributed/world.py")
# Code whose operations are kernels. A rank that does not return from them waits for its GPU.
KERNEL_CODE = re.compile(
    r"/(torch(?!/utils/data)|deepspeed|transformers|triton|flash_attn|liger_kernel)/"
    r"|/ptune_dist/(base|evaluation|families|model|objectives|optim|prompts|zero)/|/ptune_dist/loop\.py$"
)
# Calls that wait for the GPU, as they stand in a line of source.
SYNCHRONIZES = re.compile(r"\.(item|tolist|cpu|numpy|nonzero|synchronize|to|cuda)\(|\b(bool|int|float)\(")
RUN_BACKWARD = ("/torch/autograd/graph.py", "_engine_run_backward")
# Standard library in which a thread waits for other threads of its own process.
THREAD_WAITS = ("/threading.py", "/queue.py", "/concurrent/futures/_base.py", "/concurrent/futures/thread.py")

HEADER = re.compile(r"^(Current thread|Thread) 0x\w+.*$", re.MULTILINE)
FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}, line {self.line})"


@dataclass(frozen=True)
class Stack:
    """The frames of one thread, the innermost first; at least one."""

    frames: tuple[Frame, ...]
    is_current: bool  # the thread that received the signal: the main thread

    @property
    def is_ours(self) -> bool:
        """Whether this is the main thread or one of autograd's, none that Python's threading has started."""
        return not self.frames[-1].file.endswith("/threading.py")


class Verdict(Enum):
    """What a thread is doing."""

    WAITS = "for another rank, as far as can be told"
    DELEGATES = "to another thread of this process"
    BUSY = "with something of its own"


def find_busy_place(stacks: str, *, on_gpu: bool) -> str:
    """Where a rank was busy when it wrote its stacks; "" if it was waiting for other ranks, or may have been."""
    threads = parse_stacks(stacks)
    main = next((thread for thread in threads if thread.is_current), None)
    if main is None:
        return ""
    own = judge_thread(main, on_gpu)
    others = [thread for thread in threads if thread is not main and (own == Verdict.DELEGATES or thread.is_ours)]
    judged = {thread: judge_thread(thread, on_gpu) for thread in [main, *others]}
    if Verdict.WAITS in judged.values():
        return ""
    busy = [thread for thread, verdict in judged.items() if verdict == Verdict.BUSY]
    if busy:
        return str(busy[0].frames[0])
    return "" if is_backward(main.frames[0]) else str(main.frames[0])  # autograd's thread has no frame: it runs kernels


def parse_stacks(text: str) -> list[Stack]:
    """The threads that have a frame, in the order of faulthandler's output."""
    headers = list(HEADER.finditer(text))
    found = []
    for i, header in enumerate(headers):
        end = headers[i + 1].start() if i + 1 < len(headers) else len(text)
        matches = FRAME.findall(text[header.end() : end])
        frames = tuple(Frame(file, int(line), function) for file, line, function in matches)
        if frames:
            found.append(Stack(frames, is_current=header[1] == "Current thread"))
    return found


def judge_thread(stack: Stack, on_gpu: bool) -> Verdict:
    innermost = stack.frames[0]
    if any(code in innermost.file for code in WAITING_CODE):
        return Verdict.WAITS
    if innermost.file.endswith(THREAD_WAITS) or (on_gpu and is_backward(innermost)):
        return Verdict.DELEGATES
    if on_gpu and (KERNEL_CODE.search(innermost.file) or is_synchronizing(innermost)):
        return Verdict.WAITS
    return Verdict.BUSY


def is_backward(frame: Frame) -> bool:
    file, function = RUN_BACKWARD
    return frame.file.endswith(file) and frame.function == function


def is_synchronizing(frame: Frame) -> bool:
    """Whether the line of source, which this node has too, reads a result of the GPU."""
    linecache.checkcache(frame.file)
    return bool(SYNCHRONIZES.search(linecache.getline(frame.file, frame.line)))
