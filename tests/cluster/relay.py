"""A switch between hosts that delivers every frame a while later: distance, on a kernel without netem.

    python -m tests.cluster.relay DEVICE...

It makes a tap device for each host and prints `ready`; whoever started it moves the devices into the hosts' namespaces.
Each line of its stdin is the delay from then on, in seconds. It ends with its stdin. Frames keep their order, the rate
is not limited, and nothing is lost: that is for the qdiscs of the devices.
"""

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
MOST_BYTES = 1 << 16
ADDRESS_BYTES = 6
STDIN = 0


def open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


class Relay:
    def __init__(self, taps: list[int]):
        self._taps = taps
        self._delay_s = 0.0
        self._places: dict[bytes, int] = {}  # hardware address -> the tap behind which it is
        self._waiting: deque[tuple[float, int, bytes]] = deque()  # due, the tap that it came from, the frame

    def run(self) -> None:
        while True:
            wait_s = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            ready, _, _ = select.select([*self._taps, STDIN], [], [], wait_s)
            for source in ready:
                if source == STDIN:
                    text = os.read(STDIN, MOST_BYTES)
                    if not text:
                        return
                    self._delay_s = float(text.split()[-1])
                else:
                    self._take(source)
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                _, source, frame = self._waiting.popleft()
                self._deliver(source, frame)

    def _take(self, source: int) -> None:
        """All frames that a host has sent."""
        due = time.monotonic() + self._delay_s
        with contextlib.suppress(BlockingIOError):
            while True:
                self._waiting.append((due, source, os.read(source, MOST_BYTES)))

    def _deliver(self, source: int, frame: bytes) -> None:
        self._places[frame[ADDRESS_BYTES : 2 * ADDRESS_BYTES]] = source
        place = self._places.get(frame[:ADDRESS_BYTES])
        for tap in self._taps if place is None else [place]:
            if tap != source:
                with contextlib.suppress(OSError):  # the host is not up
                    os.write(tap, frame)


def main() -> None:
    # The hosts may take all of the machine's time, and must not lengthen the delay by that.
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    taps = [open_tap(name) for name in sys.argv[1:]]
    print("ready", flush=True)
    Relay(taps).run()


if __name__ == "__main__":
    main()
