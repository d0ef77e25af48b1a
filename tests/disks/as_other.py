"""Run ptune_dist with the rights of an ordinary user, although root runs the tests.

usage: as_other.py UMASK ARGUMENT ...

Root's capabilities to ignore permissions are dropped first. Root's own files then are those of this user, and those of
any other user id are another user's.
"""

import ctypes
import os
import runpy
import sys

VERSION_3 = 0x20080522  # of capset(2)
CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER = 0, 1, 2, 3  # capabilities(7)


class Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def drop_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = Header(VERSION_3, 0)
    sets = (Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capget")
    mask = ~sum(1 << number for number in (CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER)) & 0xFFFFFFFF
    for name in ("effective", "permitted", "inheritable"):
        setattr(sets[0], name, getattr(sets[0], name) & mask)
    if libc.capset(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    drop_capabilities()
    os.umask(int(sys.argv[1], 8))
    sys.argv = ["ptune_dist", *sys.argv[2:]]
    runpy.run_module("ptune_dist", run_name="__main__", alter_sys=True)
