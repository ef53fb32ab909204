"""What a lab needs of the machine, and which of it is not there."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

TUN = "/dev/net/tun"
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21


def missing() -> list[str]:
    """Of root, gcc, ip, iptables and /dev/net/tun; [] is fine."""
    if sys.platform != "linux":
        return ["Linux"]
    lacking = [] if _is_root() else ["root"]
    lacking += [program for program in ("gcc", "ip", "iptables") if shutil.which(program) is None]
    return lacking if _opens(TUN) else [*lacking, TUN]


def _is_root() -> bool:
    """Root of a container may lack what makes namespaces, and then is not the root that is needed."""
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    bits = int(effective[1], 16) if effective else 0
    return os.geteuid() == 0 and all(bits >> capability & 1 for capability in (CAP_NET_ADMIN, CAP_SYS_ADMIN))


def _opens(device: str) -> bool:
    """A container may show a device that it may not use."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True
