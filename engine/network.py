"""The network as this machine sees it, without torch: interfaces, and what names mean here.

torchrun says where the ranks meet, and gloo picks the interface whose address it tells the others;
both go by the machine's own name. In containers and on many laptops that name means the machine
itself (127.0.0.1), which is no use to another machine. Nothing is changed here, and no packet sent.
"""

import ctypes
import fcntl
import ipaddress
import socket
import struct
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SIOCGIFCONF = 0x8912
SIOCGIFFLAGS = 0x8913
SIOCGIFMTU = 0x8921
"""linux/sockios.h."""
IFF_RUNNING = 0x40
"""linux/if.h: up, and the cable is in."""
ROOM_BYTES = 64 * 2**10
IFREQ_BYTES = 40
"""sizeof(struct ifreq) on 64 bits: a name of 16 bytes, then an address or a number."""
IF_INET6 = Path("/proc/net/if_inet6")


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine."""

    name: str
    addresses: tuple[str, ...]
    is_running: bool
    mtu_bytes: int
    """The largest packet."""

    @property
    def is_loopback(self) -> bool:
        return self.name == "lo"


def interfaces() -> list[Interface]:
    """All of them that have an address, in the kernel's order."""
    found = _addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        return [
            Interface(
                name=name,
                addresses=tuple(found[name]),
                is_running=bool(_number(asked, SIOCGIFFLAGS, name, "H") & IFF_RUNNING),
                mtu_bytes=_number(asked, SIOCGIFMTU, name, "i"),
            )
            for _, name in socket.if_nameindex()
            if found[name]
        ]


def addresses_of(host: str) -> list[str]:
    """What a name means here, without doubles; empty if it means nothing."""
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(each[4][0]).partition("%")[0] for each in found))


def means_only_here(host: str) -> bool:
    """Whether it means this machine itself, wherever it is said: loopback, and nothing else."""
    found = addresses_of(host)
    return bool(found) and all(ipaddress.ip_address(each).is_loopback for each in found)


def own_address() -> str:
    """What gloo tells the other ranks by itself: the first address of this machine's name that is
    one of its own; "" where none is, and gloo takes loopback."""
    for address in addresses_of(socket.gethostname()):
        with suppress(OSError), socket.socket(_family(address)) as tried:
            tried.bind((address, 0))
            return address
    return ""


def way_to(host: str) -> Interface | None:
    """The interface whose address this machine has towards `host`; None if there is no route."""
    for address in addresses_of(host):
        with suppress(OSError), socket.socket(_family(address), socket.SOCK_DGRAM) as asked:
            asked.connect((address, 1))  # a datagram's socket: it looks up the route, no more
            own = asked.getsockname()[0].partition("%")[0]
            return next((each for each in interfaces() if own in each.addresses), None)
    return None


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _addresses() -> dict[str, list[str]]:
    """Each interface's addresses of IPv4, then of IPv6."""
    found: dict[str, list[str]] = defaultdict(list)
    room = bytearray(ROOM_BYTES)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        num_bytes = _fill(asked, room)
    for start in range(0, num_bytes, IFREQ_BYTES):
        label = room[start : start + 16].partition(b"\0")[0].decode()
        name = label.partition(":")[0]  # eth0:1 is another address of eth0
        found[name].append(socket.inet_ntoa(room[start + 20 : start + 24]))
    with suppress(OSError):  # a kernel without IPv6
        for line in IF_INET6.read_text(encoding="ascii").splitlines():
            digits, _, _, _, _, name = line.split()
            found[name].append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found


def _fill(asked: socket.socket, room: bytearray) -> int:
    """Let the kernel write its list of struct ifreq into `room`; the number of bytes written."""
    place = ctypes.addressof(ctypes.c_char.from_buffer(room))
    request = struct.pack("iP", len(room), place)
    return int(struct.unpack("iP", fcntl.ioctl(asked, SIOCGIFCONF, request))[0])


def _number(asked: socket.socket, what: int, name: str, kind: str) -> int:
    """A number that the kernel knows of an interface; 0 if it has just gone."""
    request = struct.pack("16s24x", name.encode()[:15])
    with suppress(OSError):
        answer = fcntl.ioctl(asked, what, request)
        return int(struct.unpack_from(kind, answer, 16)[0])
    return 0
