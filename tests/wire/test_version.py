"""A change of a message is a change of the protocol: both sides must be able to tell."""

import hashlib
import typing

import msgspec

from kvkeep.terms import GroupSpec
from kvkeep.wire import messages as msg

# By version, the digest of what every message looks like. A mismatch means that a message changed:
# raise VERSION and add a line; never change one.
DIGESTS = {
    2: "90b7f1fef223edcd",
    3: "916f3d80d75a1695",
    4: "4d5eaaabeb9fd6c2",
    5: "dd7e8e2dd6434075",
    6: "8bb39810cf5ee102",
    7: "755c55103f3682b8",
    8: "d1dd32dfd6143ac6",
}


def shape() -> str:
    kinds = [*typing.get_args(msg.Request), *typing.get_args(msg.Reply), msg.Reservation, msg.Miss]
    rows = [
        [
            kind.__name__,
            kind.__struct_config__.tag,
            [[f.name, str(f.type)] for f in msgspec.structs.fields(kind)],
        ]
        for kind in kinds
    ]
    rows.append(sorted(map(str, typing.get_type_hints(GroupSpec, include_extras=True).items())))
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def test_messages_are_those_of_their_version() -> None:
    assert DIGESTS[msg.VERSION] == shape()
