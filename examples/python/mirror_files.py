"""The files of a mirror, written as docs/format.md has them; for Unix.

    mirror = Mirror("some/directory")   # opens it and mends what a crash has left, or begins a new one
    mirror.create(journal)              # only if mirror.journal is None
    mirror.begin_segment(segment, page)
    mirror.append(batch, end)           # bytes that were verified, and the Checkpoint at their end
    mirror.sync()                       # from here on they may be acknowledged: mirror.durable
    mirror.close()

Whoever calls verifies. An OSError leaves the mirror as a crash would: it must be opened anew.
"""

import fcntl
import os
import re
import struct
import uuid
import zlib

from read_journal import (
    HEADER_PAGE,
    MARK_MAGIC,
    NODE_MAGIC,
    Damage,
    Invalid,
    Mark,
    Segment,
    Unsupported,
    genesis,
    read_base,
    read_header,
    read_mark,
    read_node,
)

SEGMENT_NAME = re.compile(r"[0-9a-f]{16}\.seg")
DERIVED_NAME = re.compile(r"([0-9a-f]{16})(?:\.idx|\.lbl|-(\d+)\.map)")
ROLE_MIRROR = 2


class Mirror:
    """A journal that is being copied: written up to `end`, synced up to `durable`."""

    def __init__(self, directory):
        self.directory = directory
        self.journal = self.node = self.end = self.durable = None  # no mirror yet
        self.segment = None  # what is written to: the last one with a batch
        self.first_segment = 0  # where the journal begins
        self._file = self._opening = self._witness = None
        self._sequence = 0
        os.makedirs(directory, exist_ok=True)
        self._lock()
        self._open()

    @property
    def witness(self):
        """The old end of a tail that was set aside, until that place has been passed again."""
        return self._witness if self._witness and self._witness.offset > self.end.offset else None

    def create(self, journal):
        """Makes this a mirror of a journal, durably."""
        node = uuid.uuid4().bytes
        data = struct.pack("<8sHB5x16s16s12x", NODE_MAGIC, 1, ROLE_MIRROR, node, journal)
        path = self._path("node.new")
        with open(path, "wb") as file:
            file.write(data + struct.pack("<I", zlib.crc32(data)))
            sync_file(file)
        os.rename(path, self._path("node"))
        sync_directory(self.directory)
        sync_directory(os.path.dirname(os.path.abspath(self.directory)))
        self.journal, self.node, self.end = journal, node, genesis(journal)
        self._write_mark()

    def begin_segment(self, segment, page):
        """The next batch opens this segment; the header page is written with it."""
        self._opening = segment, page

    def append(self, batch, end):
        if self._opening:
            self._roll()
        self._file.write(batch)
        self.end = end

    def sync(self):
        """Makes everything durable that was appended, and says so in the mark."""
        if self._file:
            sync_file(self._file)
        self._write_mark()

    def close(self):
        if self.journal:
            if self._file:
                sync_file(self._file)
            self._write_mark(closed=True)

    def _path(self, *names):
        return os.path.join(self.directory, *names)

    def segment_path(self, number):
        return self._path(f"{number:016x}.seg")

    def _lock(self):
        self._lock_file = open(self._path("lock"), "a+b")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{self.directory}: another process writes to this mirror") from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"follow_journal.py, process {os.getpid()}\n".encode())
        self._lock_file.flush()

    def _roll(self):
        if self._file:
            sync_file(self._file)
            self._file.close()
        self.segment, page = self._opening
        self._opening = None
        self._file = open(self.segment_path(self.segment.number), "w+b")
        self._file.write(page)
        sync_directory(self.directory)

    def _write_mark(self, closed=False):
        """Everything up to the end is synced. Each write of the mark is synced too: so what is acknowledged is proven."""
        self._sequence += 1
        flags = (1 if closed else 0) | (2 if self.witness else 0)
        salt = self.segment.salt & 0xFFFFFFFF if self.segment else 0
        slot = struct.pack("<8sHxxIQ", MARK_MAGIC, 1, flags, self._sequence) + self.end.pack()
        slot += struct.pack("<QQ16s", *(self.witness or (0, 0, bytes(16)))) + struct.pack("<I", salt)
        path = self._path("mark")
        is_new = not os.path.exists(path)
        with open(path, "w+b" if is_new else "r+b") as file:
            file.truncate(8192)
            file.seek(self._sequence % 2 * 4096)
            file.write(slot + struct.pack("<I", zlib.crc32(slot)))
            sync_file(file)
        if is_new:
            sync_directory(self.directory)
        self.durable = self.end

    # --------------------------------------------------------------------------- opening what is there already

    def _open(self):
        names = os.listdir(self.directory)
        for name in ("incoming", "gaps"):
            if name in names:
                raise Unsupported(f"{self._path(name)}: this isn't a mirror that can be followed into")
        node = read_node(self.directory)
        if node and node.role != "mirror":
            raise Unsupported(f"{self.directory} is an {node.role}, not a mirror")
        if node:
            self.journal, self.node = node.journal, node.id
            self._recover()
        elif any(map(SEGMENT_NAME.fullmatch, names)):
            raise Damage(f"{self.directory}: segments without a node: a copy, not a mirror")

    def _recover(self):
        """Survey, decide, mend: `Recovery` in docs/format.md, as far as it concerns a mirror."""
        base = read_base(self.directory, self.journal)
        start, first = (base.start, base.first_segment) if base else (genesis(self.journal), 0)
        mark = read_mark(self.directory) or Mark(start, 0, None)
        if mark.end.journal == self.journal and mark.end.offset < start.offset:
            mark = mark._replace(end=start)
        self.first_segment = first
        headers = self._headers(first)
        self.end, kept, seen = self._survey(headers, first, start, mark)
        if mark.end.journal != self.journal or (mark.end.offset <= self.end.offset and not seen):
            raise Damage(f"{self.directory}: another history than the one that was marked durable here")
        self._witness, self._sequence = mark.witness, mark.sequence
        if self.end.offset < mark.end.offset:
            self._lower(mark.end.place)
        active = kept[-1][0].number if kept else first - 1
        self._set_segments_aside(active)
        for segment, length in kept:
            self._cut_tail(segment, length)
            self._rewrite(segment, length, mark.end.offset)
        self._remove_derived(active)
        if kept:
            self.segment, length = kept[-1]
            self._file = open(self.segment.path, "r+b")
            self._file.seek(length)
        self._write_mark()

    def _headers(self, first):
        """The valid segment headers by number. Others are those of spares, or damaged: fetched again."""
        headers = {}
        for number in self._segment_numbers():
            path = self.segment_path(number)
            with open(path, "rb") as file:
                page = file.read(HEADER_PAGE)
            try:
                segment = Segment(path, number, read_header(path, page), b"")
            except Invalid:
                continue
            if number >= first and segment.journal == self.journal:
                headers[number] = segment
        return headers

    def _segment_numbers(self):
        return sorted(int(name[:16], 16) for name in os.listdir(self.directory) if SEGMENT_NAME.fullmatch(name))

    def _survey(self, headers, first, start, mark):
        """Where the valid batches end; the segments that were read, with their lengths; whether the mark's place is there.

        Begins with the segment that holds the mark's place; further in front where no batch tells what lies there."""
        number = first
        while number + 1 in headers and headers[number + 1].base_offset < mark.end.offset:
            if not reaches(headers[number], headers[number + 1]):
                break
            number += 1
        while number > first:
            chain_start = genesis(self.journal)._replace(**headers[number].start._asdict())
            end, kept, seen = self._walk(headers, number, chain_start, mark)
            if kept:
                return end, kept, seen
            number -= 1
        return self._walk(headers, first, start, mark)

    def _walk(self, headers, number, end, mark):
        kept, seen = [], end.place == mark.end.place
        while number in headers and headers[number].start == end.place:
            segment, at = headers[number], HEADER_PAGE
            with open(segment.path, "rb") as file:
                segment.data = file.read()
            try:
                while True:
                    batch = segment.batch(at)
                    batch.check_continues(end.place, segment if at == HEADER_PAGE else None)
                    batch.records()
                    end = batch.end(self.journal)
                    seen = seen or end.place == mark.end.place
                    at += batch.length
            except Invalid:
                pass
            if at == HEADER_PAGE:
                break
            kept.append((segment, at))
            number += 1
        return end, kept, seen

    def _lower(self, old_end):
        """In front of setting anything aside that had been durable: in both slots, with the old end as witness."""
        if self._witness is None or self._witness.offset < old_end.offset:
            self._witness = old_end
        self._write_mark()
        self._write_mark()

    def _set_segments_aside(self, active):
        for number in reversed(self._segment_numbers()):
            if number <= active:
                break
            path = self.segment_path(number)
            if is_zeros(path):  # a spare
                os.remove(path)
            else:
                os.rename(path, self._quarantine(f"{number:016x}-{uuid.uuid4().hex}.seg"))
                sync_directory(self._path("quarantine"))
            sync_directory(self.directory)

    def _cut_tail(self, segment, length):
        """Copies what lies behind the end, and cuts it off."""
        tail = segment.data[length:]
        if tail.strip(b"\0"):
            with open(self._quarantine(f"{segment.number:016x}-{uuid.uuid4().hex}.tail"), "wb") as file:
                file.write(tail)
                sync_file(file)
            sync_directory(self._path("quarantine"))
        if tail:
            with open(segment.path, "r+b") as file:
                file.truncate(length)
                sync_file(file)

    def _quarantine(self, name):
        os.makedirs(self._path("quarantine"), exist_ok=True)
        sync_directory(self.directory)
        return self._path("quarantine", name)

    def _rewrite(self, segment, length, proven):
        """Writes again what may exist in a cache only, that a failed sync has marked clean."""
        unproven = 0 if segment.base_offset >= proven else HEADER_PAGE + proven - segment.base_offset
        if unproven < length:
            with open(segment.path, "r+b") as file:
                file.seek(unproven)
                file.write(segment.data[unproven:length])
                sync_file(file)
            sync_directory(self.directory)
        segment.data = b""

    def _remove_derived(self, active):
        """Indexes that speak of segments which will grow."""
        for name in os.listdir(self.directory):
            match = DERIVED_NAME.fullmatch(name)
            if match and int(match[1], 16) + 8 ** int(match[2] or 0) > active:
                os.remove(self._path(name))
        sync_directory(self.directory)


def reaches(segment, follower):
    """Whether a segment's file is as long as its follower says."""
    return os.path.getsize(segment.path) >= HEADER_PAGE + follower.base_offset - segment.base_offset


def is_zeros(path):
    with open(path, "rb") as file:
        return not any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b""))


def sync_file(file):
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path):
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
