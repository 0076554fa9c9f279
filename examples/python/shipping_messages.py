"""The messages of docs/protocol.md: a table of them, frames to bytes and back.

A message is a row of MESSAGES: its type and its fields in order; a field is a name and a Kind. What is added to the
protocol is added to the table, and to the handlers of whoever takes it.
"""

import collections
import struct
import types
import zlib

from read_journal import HEADER_PAGE, Checkpoint

FRAME_HEADER_BYTES = 12
CONTROL_BYTES_MAX = 4096
DATA_COVERED_BYTES = 32
DATA_FRAME_BYTES_MIN = 8192
UNKNOWN = 2**64 - 1


class Retry(Exception):
    """This connection is over; the next one may go well."""

    answer = None  # the ERROR that the origin gets

    def __init__(self, why, wait_ms=0):
        super().__init__(why)
        self.wait_ms = wait_ms


class Breach(Retry):
    """The origin broke the protocol, or a frame was damaged on the way."""

    answer = "PROTOCOL"


class FrameTooLong(Breach):
    """What is said to follow is more than was agreed upon."""

    answer = "FRAME_TOO_LONG"


def demand(condition, what):
    if not condition:
        raise Breach(what)


Kind = collections.namedtuple("Kind", "read write")


class Source:
    """Takes fields from the front of a payload, never behind its end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def bytes(self, length):
        demand(self.at + length <= len(self.data), "payload too short")
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self, code):
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def rest(self):
        return self.bytes(len(self.data) - self.at)


def number(code):
    return Kind(lambda source: source.number(code), lambda value: struct.pack("<" + code, value))


def fixed(length):
    return Kind(lambda source: source.bytes(length), bytes)


def reserved(length):
    def read(source):
        demand(not any(source.bytes(length)), "a reserved field isn't zero")

    return "reserved", Kind(read, lambda _: bytes(length))


def sized(length_max):
    """Bytes behind their length (2)."""

    def read(source):
        length = source.number("H")
        demand(length <= length_max, "a field is too long")
        return source.bytes(length)

    return Kind(read, lambda value: struct.pack("<H", len(value)) + value)


def several(count_code, count_max, element):
    """Several of a kind behind their number."""

    def read(source):
        count = source.number(count_code)
        demand(count <= count_max, "too many of them")
        return [element.read(source) for _ in range(count)]

    def write(values):
        return struct.pack("<" + count_code, len(values)) + b"".join(map(element.write, values))

    return Kind(read, write)


def read_checkpoint(source):
    data = source.bytes(64)
    demand(any(data[:16]) and not any(data[60:]), "a checkpoint is invalid")
    return Checkpoint.unpack(data)


def read_checkpoint_or_zeros(source):
    data = source.bytes(64)
    return read_checkpoint(Source(data)) if any(data) else None


def read_ids(source):
    count = source.number("Q")
    demand(count <= 8, "the path is too long")
    return [source.bytes(16) for _ in range(count)]


U8, U16, U32, U64, I64 = map(number, "BHIQq")
ID = CHAIN = fixed(16)
CHECKPOINT = Kind(read_checkpoint, Checkpoint.pack)
CHECKPOINT_OR_ZEROS = Kind(read_checkpoint_or_zeros, lambda end: end.pack() if end else bytes(64))
IDS = Kind(read_ids, lambda ids: struct.pack("<Q", len(ids)) + b"".join(ids))
REST = Kind(Source.rest, bytes)
POSITIONS = several("Q", 64, U64)
ENDS = several("Q", 64, fixed(32))  # offset (8), position (8), chain
TEXTS = several("H", 8, sized(256))

MESSAGES = {
    "HELLO": (
        0x01,
        ("magic", fixed(4)),
        ("lowest", U16),
        ("highest", U16),
        ("features", U64),
        ("frame_max", U32),
        reserved(4),
        ("node", ID),
        ("nonce", ID),
        ("authentication_kind", U16),
        ("authentication", sized(1024)),
        ("agent", sized(64)),
    ),
    "WELCOME": (
        0x02,
        ("version", U16),
        ("heartbeat_ms", U16),
        ("frame_max", U32),
        ("features", U64),
        ("node", ID),
        ("session", ID),
        ("nonce", ID),
        ("clock_us", I64),
    ),
    "SUBSCRIBE": (
        0x03,
        ("end", CHECKPOINT_OR_ZEROS),
        ("mode", U8),
        ("flags", U8),
        reserved(2),
        ("window", U32),
        ("witness_offset", U64),
        ("witness_position", U64),
        ("witness_chain", CHAIN),
        reserved(8),
    ),
    "SUBSCRIBED": (0x04, ("durable", CHECKPOINT), ("first_position", U64), ("path", IDS)),
    "DIVERGED": (
        0x05,
        ("reason", U8),
        ("flags", U8),
        ("speaker", U8),
        reserved(5),
        ("common_position", U64),
        ("common_chain", CHAIN),
        ("durable", CHECKPOINT),
    ),
    "PROBE": (0x06, ("positions", POSITIONS)),
    "PROBED": (0x07, ("ends", ENDS)),
    "DATA": (0x10, ("offset", U64), ("durable_offset", U64), ("durable_position", U64), reserved(8), ("data", REST)),
    "SEGMENT": (0x11, ("page", fixed(HEADER_PAGE))),
    "HEARTBEAT": (0x16, ("durable", CHECKPOINT), ("clock_us", I64), ("speaker", U8), reserved(7), ("echo", U64)),
    "ACK": (0x17, ("durable", CHECKPOINT), ("applied", U64), ("echo", U64)),
    "TRUNCATED": (0x18, ("start", CHECKPOINT), ("sources", TEXTS)),
    "ERROR": (
        0x1E,
        ("code", U16),
        ("lowest", U16),
        ("highest", U16),
        reserved(2),
        ("wait_ms", U32),
        ("position", U64),
        ("detail", sized(512)),
    ),
    "GOAWAY": (0x1F, ("wait_ms", U32), reserved(4)),
}
NAMES = {row[0]: name for name, row in MESSAGES.items()}
OPTIONAL, CONTINUED = 1, 2

HELLO_MAGIC = b"HWSP"
HAS_WITNESS = 1  # flag of SUBSCRIBE
AT_WITNESS, COMMON_KNOWN = 1, 2  # flags of DIVERGED; others are refused
RELAY_APART = 3  # who speaks in DIVERGED and HEARTBEAT: 0 the origin, 1 to 3 relays
DIVERGED = {1: "AHEAD", 2: "FORK", 3: "FOREIGN"}
ERRORS = {
    1: "VERSION",
    2: "AUTH_REQUIRED",
    3: "DENIED",
    4: "UNKNOWN_JOURNAL",
    8: "TRUNCATED",
    9: "CYCLE",
    10: "TOO_MANY",
    11: "SLOW_CONSUMER",
    12: "FRAME_TOO_LONG",
    13: "PROTOCOL",
    14: "CORRUPT",
    15: "STORAGE",
    16: "SHUTTING_DOWN",
    17: "TIMEOUT",
    18: "UNSUPPORTED",
    19: "RATE",
    20: "NOT_YET",
    21: "REFUSED",
}
HALTING = {"VERSION", "AUTH_REQUIRED", "DENIED", "UNKNOWN_JOURNAL", "TRUNCATED", "CORRUPT", "UNSUPPORTED"}
ERROR_CODES = {name: code for code, name in ERRORS.items()}


def encode(name, **values):
    """A whole control frame."""
    kind, *fields = MESSAGES[name]
    payload = b"".join(field.write(values.get(key)) for key, field in fields)
    front = struct.pack("<IBBH", len(payload), kind, 0, 0)
    return front + struct.pack("<I", zlib.crc32(front + payload)) + payload


def decode(kind, flags, subscription, payload):
    """A message, or None if it may be passed over."""
    if kind not in NAMES:
        demand(flags & OPTIONAL, f"a frame of an unknown type: {kind:#04x}")
        return None
    name = NAMES[kind]
    demand(flags == 0 or (name, flags) == ("DATA", CONTINUED), f"flags of {name}")
    demand(subscription == 0, "a subscription that isn't known")
    source = Source(payload)
    values = {key: field.read(source) for key, field in MESSAGES[name][1:]}
    demand(not source.rest(), f"{name} is too long")
    return types.SimpleNamespace(name=name, continued=bool(flags & CONTINUED), **values)


class FrameReader:
    """Takes bytes as they come, gives messages."""

    def __init__(self):
        self.buffer = bytearray()
        self.data_bytes_max = None  # no DATA before WELCOME

    def push(self, data):
        self.buffer += data

    def next(self):
        """The next message, or None if more bytes are needed."""
        while len(self.buffer) >= FRAME_HEADER_BYTES:
            length, kind, flags, subscription, crc = struct.unpack_from("<IBBHI", self.buffer)
            is_data = NAMES.get(kind) == "DATA"
            self._check_length(length, is_data)
            covered = FRAME_HEADER_BYTES + (min(length, DATA_COVERED_BYTES) if is_data else length)
            if len(self.buffer) < covered:
                return None
            # In front of waiting for the rest: the length may be what is damaged.
            demand(zlib.crc32(self.buffer[:8] + self.buffer[12:covered]) == crc, "a frame's checksum is wrong")
            if len(self.buffer) < FRAME_HEADER_BYTES + length:
                return None
            payload = bytes(self.buffer[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + length])
            del self.buffer[: FRAME_HEADER_BYTES + length]
            message = decode(kind, flags, subscription, payload)
            if message:
                return message
        return None

    def _check_length(self, length, is_data):
        demand(not is_data or self.data_bytes_max, "DATA in front of WELCOME")
        if length > (self.data_bytes_max if is_data else CONTROL_BYTES_MAX):
            raise FrameTooLong(f"a frame of {length} bytes")
