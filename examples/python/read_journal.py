#!/usr/bin/env python3
"""Reads a Headwater journal and prints its events, one JSON object a line.

    python3 read_journal.py DIR

DIR is a store (it holds journal/), a journal's directory, or a mirror. Written from docs/format.md alone, with the
standard library alone. All checksums are verified, and the chain of BLAKE3 hashes: with the package `blake3` if it is
installed, else with slow_blake3.py.

Shows only what is proven to be durable, and changes nothing. Exit codes: 0 fine, 1 failed, 2 usage, 3 damage.
"""

import collections
import datetime
import json
import os
import re
import struct
import sys
import unicodedata
import uuid
import zlib

try:
    from blake3 import blake3
except ImportError:
    from slow_blake3 import blake3

HEADER_PAGE = 4096
HEADER_COPY = 512
SEGMENT_MAGIC = b"\x89HWSEG\r\n"
BASE_MAGIC = b"\x89HWBAS\r\n"
NODE_MAGIC = b"\x89HWNOD\r\n"
MARK_MAGIC = b"\x89HWMRK\r\n"
BATCH_MAGIC = b"\xb7HWB"
BATCH_BYTES_MAX = 16 << 20
CODECS = {0: "raw", 1: "bincode", 2: "json"}


class Unsupported(Exception):
    """Written by a later version."""


class Damage(Exception):
    """Acknowledged data that can't be read."""


class Invalid(Exception):
    """No valid value lies here."""


def check(condition, what):
    if not condition:
        raise Invalid(what)


# ------------------------------------------------------------------------------------------- node and mark


Node = collections.namedtuple("Node", "role journal id")
Mark = collections.namedtuple("Mark", "end sequence witness")


class Place(collections.namedtuple("Place", "offset position chain")):
    """The end of a batch, or where a journal begins."""


class Checkpoint(collections.namedtuple("Checkpoint", "journal incarnation offset position chain epoch")):
    """A place, with the journal, and with incarnation and epoch of the batch that ends there (0 at the beginning)."""

    LAYOUT = "<16sQQQ16sI4x"

    @classmethod
    def unpack(cls, data, at=0):
        return cls(*struct.unpack_from(cls.LAYOUT, data, at))

    def pack(self):
        return struct.pack(self.LAYOUT, *self)

    @property
    def place(self):
        return Place(self.offset, self.position, self.chain)


def genesis(journal):
    """The beginning of a journal."""
    chain = blake3(b"headwater genesis v1\0" + journal).digest()[:16]
    return Checkpoint(journal, 0, 0, 0, chain, 0)


def read_node(directory):
    """A Node, or None in a copy."""
    try:
        with open(os.path.join(directory, "node"), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return None
    if len(data) != 64 or data[:8] != NODE_MAGIC or zlib.crc32(data[:60]) != u32(data, 60):
        raise Damage(f"{directory}/node is damaged")
    version, role = struct.unpack_from("<HB", data, 8)
    if version != 1:
        raise Unsupported(f"{directory}/node: version {version}")
    if role not in (1, 2, 3):
        raise Damage(f"{directory}/node: role {role}")
    return Node({1: "origin", 2: "mirror", 3: "feed"}[role], data[32:48], data[16:32])


def read_mark(directory):
    """The newest valid slot as a Mark, or None."""
    try:
        with open(os.path.join(directory, "mark"), "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return None
    marks = []
    for at in (0, 4096):
        slot = data[at : at + 128]
        if len(slot) < 128 or slot[:8] != MARK_MAGIC or zlib.crc32(slot[:124]) != u32(slot, 124):
            continue
        version, _, flags, sequence = struct.unpack_from("<HHIQ", slot, 8)
        if version != 1 or flags & ~3:
            continue
        witness = Place(*struct.unpack_from("<QQ16s", slot, 88)) if flags & 2 else None
        marks.append(Mark(Checkpoint.unpack(slot, 24), sequence, witness))
    return max(marks, key=lambda mark: (mark.end.offset, mark.sequence), default=None)


Base = collections.namedtuple("Base", "start first_segment durable")


def read_base(directory, journal):
    """Where the journal begins, if its oldest events were removed."""
    path = os.path.join(directory, "base")
    try:
        with open(path, "rb") as file:
            data = file.read(2 * 4096)
    except FileNotFoundError:
        return None
    for at in (0, 4096):
        page = data[at : at + 4096]
        if len(page) < 4096 or page[:8] != BASE_MAGIC:
            continue
        start = Checkpoint.unpack(page, 16)
        key = start.journal + struct.pack("<QQ", start.offset, at // 4096)
        if zlib.crc32(key + page[:4092]) != u32(page, 4092):
            continue
        (version,) = struct.unpack_from("<H", page, 8)
        if version != 1:
            raise Unsupported(f"{path}: version {version}")
        first_segment, durable = struct.unpack_from("<QQ", page, 80)
        if start.journal != journal or not first_segment or durable < start.offset:
            break
        return Base(start, first_segment, durable)
    raise Damage(f"{path} is damaged")


def u32(data, at):
    return struct.unpack_from("<I", data, at)[0]


# ----------------------------------------------------------------------------------------------- segments


class Segment:
    """A segment file with a valid header."""

    def __init__(self, path, number, copy, data):
        self.path, self.number, self.data, self.copy = path, number, data, copy
        (
            self.group_alignment,
            self.journal,
            stored_number,
            self.epoch,
            self.incarnation,
            self.base_position,
            self.base_offset,
            self.durable_offset,
            self.salt,
            self.capacity,
        ) = struct.unpack_from("<I16sQI4xQQQQQ8xQ", copy, 20)
        predecessor, predecessor_end, self.chain = struct.unpack_from("<QQ16s", copy, 112)
        check(stored_number == number, "segment number")
        check(predecessor == (number - 1) % 2**64, "predecessor's number")
        check(predecessor_end == self.base_offset, "predecessor's end")
        check(self.group_alignment in (64, 512, 4096), "group alignment")
        check(self.durable_offset <= self.base_offset, "durable offset")
        check(self.base_offset % 64 == 0, "base offset")

    @property
    def start(self):
        return Place(self.base_offset, self.base_position, self.chain)

    def batch(self, at):
        """The valid batch at a file offset."""
        return self.read_batch(self.data, at)

    def read_batch(self, data, at):
        """The valid batch of this segment at a place of `data`."""
        check(data[at : at + 4] == BATCH_MAGIC, "no batch")
        check(len(data) >= at + 128, "cut batch header")
        (length,) = struct.unpack_from("<H", data, at + 4)
        check(128 <= length <= 4096 and length % 8 == 0 and at + length <= len(data), "header length")
        header = data[at : at + length]
        crc = zlib.crc32(struct.pack("<Q", self.salt) + header[:12] + bytes(4) + header[16:])
        check(crc == u32(header, 12), "header checksum")
        (required,) = struct.unpack_from("<H", header, 6)
        if required:
            raise Unsupported(f"{self.path}: batch at {at} requires {required:#x}")
        batch = Batch()
        (stored, raw, body_crc, batch.count, batch.position, batch.offset, batch.durable) = struct.unpack_from(
            "<IIIIQQQ", header, 16
        )
        batch.epoch, padded, batch.incarnation, batch.time_us, batch.chain = struct.unpack_from(
            "<IIQq16s", header, 56
        )
        used = length + stored
        check(used <= BATCH_BYTES_MAX, "batch length")
        check(padded % 64 == 0 and used <= padded < used + 4160, "padded length")
        check(padded <= BATCH_BYTES_MAX + 4096, "padded length")
        check(raw == stored, "raw length")
        check(1 <= batch.count <= stored // 58, "event count")
        check(batch.durable <= batch.offset and batch.offset % 64 == 0, "offsets")
        check(at + padded <= len(data), "cut batch")
        batch.body = data[at + length : at + used]
        check(zlib.crc32(batch.body) == body_crc, "body checksum")
        check(not any(data[at + used : at + padded]), "padding")
        batch.header, batch.length = header, padded
        return batch


class Batch:
    """A batch whose checksums were verified."""

    def end(self, journal):
        """The place behind it, as a Checkpoint."""
        end = self.offset + self.length, self.position + self.count
        return Checkpoint(journal, self.incarnation, *end, self.chain, self.epoch)

    def check_continues(self, place, segment):
        """That it lies at a place, and has the right chain; `segment` if it is the segment's first."""
        check((self.offset, self.position) == place[:2], "place")
        check(self.chain == self.chain_after(place.chain, segment), "chain")

    def chain_after(self, chain, segment):
        """The chain at the end of this batch; `segment` if it is the segment's first."""
        hasher = blake3(b"headwater batch chain v1\0" + chain)
        hasher.update(blake3(segment.copy).digest() if segment else bytes(32))
        hasher.update(self.header[:12] + bytes(4) + self.header[16:80] + bytes(16) + self.header[96:])
        hasher.update(blake3(self.body).digest())
        return hasher.digest()[:16]

    def records(self):
        """The records, as dictionaries."""
        rest, records = self.body, []
        for index in range(self.count):
            record, rest = read_record(rest)
            records.append({"position": self.position + index, **times(self.time_us), **record})
        check(not rest, "bytes behind the last record")
        return records


def read_header(path, page):
    """The first valid copy of a segment's header."""
    valid = None
    for at in (0, HEADER_COPY):
        copy = page[at : at + HEADER_COPY]
        if len(copy) < HEADER_COPY or copy[:8] != SEGMENT_MAGIC or zlib.crc32(copy[:508]) != u32(copy, 508):
            continue
        version, length, required = struct.unpack_from("<HHH", copy, 8)
        if version != 1 or required:
            raise Unsupported(f"{path}: version {version}, requires {required:#x}")
        if valid is None and length == HEADER_COPY and copy[18] == 1:
            valid = copy
    check(valid is not None, "segment header")
    return valid


def read_segment(path, number):
    """A Segment, or None if it is a spare."""
    with open(path, "rb") as file:
        data = file.read()
    page = data[:HEADER_PAGE]
    if not any(page):
        check(not any(data), "lost header")
        return None
    return Segment(path, number, read_header(path, page), data)


# ------------------------------------------------------------------------------------------------ records


class Fields:
    """Takes fields from the front of bytes, never behind their end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def bytes(self, length):
        check(self.at + length <= len(self.data), "record too short")
        self.at += length
        return self.data[self.at - length : self.at]

    def unpack(self, layout):
        values = struct.unpack("<" + layout, self.bytes(struct.calcsize("<" + layout)))
        return values if len(values) > 1 else values[0]

    def text(self, length):
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise Invalid("text") from None

    def text16(self):
        return self.text(self.unpack("H"))


def read_record(data):
    """(a record's fields, the bytes behind it)"""
    check(len(data) >= 6, "record too short")
    length, header_length = struct.unpack_from("<IH", data)
    check(header_length <= length <= len(data), "record length")
    fields = Fields(data[:header_length])
    fields.bytes(6)
    required, _ignorable, codec, present, schema_version = fields.unpack("HHBBI")
    if required:
        raise Unsupported(f"a record requires {required:#x}")
    check(not present & ~15, "fields")
    event_id, revision = fields.bytes(16), fields.unpack("Q")
    stream_length, type_length, tags, pairs, _room = fields.unpack("HHHHQ")
    record = {
        "id": text_id(event_id),
        "stream": name(fields.text(stream_length)),
        "revision": revision,
        "type": name(fields.text(type_length)),
        "schema_version": schema_version,
        "codec": CODECS.get(codec, f"codec-{codec}"),
        "tags": [fields.text16() for _ in range(tags)],
    }
    if present & 1:
        record["occurred_at_us"] = fields.unpack("q")
    if present & 2:
        record["correlation"] = text_id(fields.bytes(16))
    if present & 4:
        journal, position = fields.unpack("16sQ")
        record["causation"] = {"journal": text_id(journal), "position": position}
    if present & 8:
        record["subject"] = fields.text16()
    record["metadata"] = [[fields.text16(), fields.text16()] for _ in range(pairs)]
    key, value = show(record["codec"], data[header_length:length])
    record[key] = value
    return record, data[length:]


def name(text):
    check(1 <= len(text.encode()) <= 255 and not has_control(text), "name")
    return text


def has_control(text):
    return any(unicodedata.category(char) == "Cc" for char in text)


def text_id(data):
    return str(uuid.UUID(bytes=bytes(data)))


def show(codec, payload):
    """A payload in the most readable form: JSON, text, or hexadecimal."""
    try:
        text = payload.decode("utf-8")
        if codec == "json":
            return "payload", json.loads(text)
    except ValueError:
        pass
    else:
        if not has_control(text):
            return "payload_text", text
    return "payload_hex", payload.hex()


def times(time_us):
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=time_us)
    return {"recorded_at": moment.isoformat(timespec="microseconds") + "Z", "recorded_at_us": time_us}


# ------------------------------------------------------------------------------------------------ journal


class Journal:
    """A journal, read once: `events`, and `damage` if acknowledged data can't be read."""

    def __init__(self, directory):
        inner = os.path.join(directory, "journal")
        self.directory = inner if os.path.isdir(inner) else directory
        self.events, self.damage = [], None
        self._read()

    def _read(self):
        names = os.listdir(self.directory)
        if "gaps" in names:
            raise Unsupported(f"{self.directory}/gaps: this reader doesn't read over accepted losses")
        node = read_node(self.directory)
        mark = read_mark(self.directory)  # before the segments: what it vouches for is there
        self.segments, self.broken = self._segments(names)
        journal = node.journal if node else next((s.journal for s in self.segments.values()), None)
        if journal is None:
            raise FileNotFoundError(f"{self.directory}: no journal here")
        self.role = node.role if node else None
        self.id = text_id(journal)
        base = read_base(self.directory, journal)
        self.end = base.start if base else genesis(journal)
        self.first_position = self.end.position
        if base:  # it takes the place of genesis; segments in front of it are no part of the journal
            self.segments = {n: s for n, s in self.segments.items() if n >= base.first_segment}
            if mark is None or (mark.end.offset < base.start.offset and mark.end.journal == journal):
                mark = Mark(base.start, 0, None)
        proven = mark.end.offset if mark else 0
        if base and self.role != "mirror":
            proven = max(proven, base.durable)
        if self.role != "mirror":  # in a mirror, headers speak of the origin's disk
            proven = max([proven] + [segment.durable_offset for segment in self.segments.values()])
        batches, claimed = self._walk(mark, base.first_segment if base else 0)
        if self.role != "mirror":
            proven = max(proven, claimed)
        if self.end.offset < proven and self.damage is None:
            self.damage = f"{self.stop}: the journal ends here, but was durable up to offset {proven}"
        for batch in batches:
            if batch.offset + batch.length <= proven:
                self.events += batch.records()
        self.proven = proven

    def _segments(self, names):
        segments, broken = {}, {}
        for file in sorted(names):
            if not re.fullmatch(r"[0-9a-f]{16}\.seg", file):
                continue
            number, path = int(file[:16], 16), os.path.join(self.directory, file)
            try:
                segment = read_segment(path, number)
                if segment:
                    segments[number] = segment
            except Invalid as why:
                broken[number] = f"{path}: {why}"
        return segments, broken

    def _walk(self, mark, number):
        """Follows the batches from the beginning on; returns them with the highest durable offset they claim."""
        batches, claimed, journal = [], 0, self.end.journal
        seen = mark is None or mark.end.offset == self.end.offset
        self.stop = self.broken.get(number, f"{self.directory}: segment {number} is missing")
        while (segment := self.segments.get(number)) and segment.journal == journal:
            if segment.start != self.end.place:
                break  # the segment in front ended too early, or this one is another's
            at = HEADER_PAGE
            while True:
                self.stop = f"{segment.path}: byte {at}, position {self.end.position}"
                try:
                    batch = segment.batch(at)
                    batch.check_continues(self.end.place, segment if at == HEADER_PAGE else None)
                    batch.records()
                except Invalid as why:
                    self.stop += f": {why}"
                    break
                batches.append(batch)
                claimed = max(claimed, batch.durable)
                at += batch.length
                self.end = batch.end(journal)
                if mark and mark.end.offset == self.end.offset:
                    seen = mark.end.place == self.end.place
            number += 1
            if number in self.broken:
                self.stop = self.broken[number]
        claimed = max([claimed] + [self._claims(s) for n, s in self.segments.items() if n >= number - 1])
        if mark and (mark.end.journal != journal or (mark.end.offset <= self.end.offset and not seen)):
            self.damage = "another history than the one that was marked durable here"
        return batches, claimed

    def _claims(self, segment):
        """The highest durable offset in the headers of valid batches behind the end."""
        claimed, start = 0, max(0, self.end.offset - segment.base_offset)
        at = HEADER_PAGE + start
        while (at := segment.data.find(BATCH_MAGIC, at)) >= 0:
            if at % 64 == 0:
                try:
                    batch = segment.batch(at)
                    if HEADER_PAGE + batch.offset - segment.base_offset == at:
                        claimed = max(claimed, batch.durable)
                except Invalid:
                    pass
            at += 1
        return claimed


def main(arguments):
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        journal = Journal(arguments[0])
    except (OSError, Unsupported) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Damage as error:
        print(f"damage: {error}", file=sys.stderr)
        return 3
    try:
        for event in journal.events:
            print(json.dumps(event, ensure_ascii=False))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(f"{journal.role or 'copy'} of journal {journal.id}, chain verified", file=sys.stderr)
    if journal.damage:
        print(f"damage: {journal.damage}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
