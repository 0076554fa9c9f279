#!/usr/bin/env python3
"""Follows a Headwater journal over the network and keeps a mirror of it: byte for byte, verified, resumable.

    python3 follow_journal.py HOST:PORT [--mirror DIR] [--journal ID] [--until POSITION] [--json]
                              [--window BYTES] [--allow-plain-tcp]

Prints every event once it is durable in the mirror, and on standard error what happens. Goes on where the mirror ends
when it is started again; an interruption (Ctrl-C, SIGTERM) closes it in good order. Without --mirror the mirror lies in a
temporary directory, for only what has been written and synced may be acknowledged to the origin.

    --mirror DIR        the mirror's directory: the journal's files lie in it
    --journal ID        begin a new mirror only if the origin serves this journal
    --until POSITION    stop once the mirror has all events in front of this position
    --json              print everything as JSON on standard output, an object a line, told apart by "kind"
    --window BYTES      how much may be under way unacknowledged (4 MiB)
    --allow-plain-tcp   follow over addresses off the loopback too: nothing is encrypted, nobody proves who they are

Exit codes: 0 reached or interrupted, 1 failed, 2 usage, 3 damage in the mirror or in what is sent again and again,
4 FORK, 5 AHEAD, 6 FOREIGN, 7 TRUNCATED, 8 CORRUPT at the origin, 9 refused by the origin for another reason.

Written from docs/protocol.md and docs/format.md alone, with the standard library alone, to be read and ported. Four files
more belong to it: shipping_messages.py has the messages, read_journal.py the format of batches, mirror_files.py the
mirror's files, and slow_blake3.py stands in for the package `blake3` where that isn't installed (install it if batches
are large: the origin doesn't wait for ever). Python 3.9 or later, on Unix.
"""

import argparse
import contextlib
import ipaddress
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import unicodedata
import uuid

import read_journal
from mirror_files import Mirror
from read_journal import BATCH_BYTES_MAX, HEADER_COPY, HEADER_PAGE, Invalid, Segment, Unsupported, genesis, text_id
from shipping_messages import (
    AT_WITNESS,
    COMMON_KNOWN,
    DATA_FRAME_BYTES_MIN,
    DIVERGED,
    ERROR_CODES,
    ERRORS,
    HALTING,
    HAS_WITNESS,
    HELLO_MAGIC,
    RELAY_APART,
    UNKNOWN,
    Breach,
    FrameReader,
    Retry,
    demand,
    encode,
)

VERSION = 1
AGENT = b"follow_journal.py/1"
FRAME_BYTES_MAX = 1 << 20
BATCH_LENGTH_MAX = BATCH_BYTES_MAX + 4096  # with its padding
SEGMENT_BYTES_MAX = 1 << 40

WELCOME_WITHIN_S = 3
ANSWER_WITHIN_S = 5
SILENCE_MAX_S = 5
WRITE_WITHIN_S = 5
ACK_EVERY_S = 1
NO_ECHO = 0  # it tells nobody how far it lags, so it needn't know how old what it is told is
BACK_OFF_MIN_S = 0.05
BACK_OFF_MAX_S = 5  # each plus up to as much again
ASKED_WAIT_MAX_S = 60
HEALTHY_AFTER_S = 5
REFUSALS_MAX = 3

EXIT_CODES = {"PLAIN_TCP": 1, "REFUSED": 3, "FORK": 4, "AHEAD": 5, "FOREIGN": 6, "TRUNCATED": 7, "CORRUPT": 8}


class Late(Retry):
    """A deadline has passed."""

    answer = "TIMEOUT"


class BadBytes(Retry):
    """Bytes of the journal that don't continue the mirror; they are fetched again, a few times."""

    answer = "REFUSED"


class Halt(Exception):
    """Trying again wouldn't help; somebody has to decide."""

    answer = None

    def __init__(self, name, why):
        super().__init__(why)
        self.name, self.exit_code = name, EXIT_CODES.get(name, 9)


class Replaced(Halt):
    """Another history comes to where the mirror had been before it set a damaged tail aside."""

    answer = "REFUSED"

    def __init__(self, witness):
        super().__init__("FORK", f"the origin doesn't have what this mirror had had up to position {witness.position}")


# --------------------------------------------------------------------------------------------------- connection


class Connection:
    """Messages over a socket, each by its deadline."""

    def __init__(self, address, allow_plain_tcp):
        with retried():
            self.socket = connect(address, allow_plain_tcp, WELCOME_WITHIN_S)
            self.socket.settimeout(WRITE_WITHIN_S)
        self.reader = FrameReader()
        self.opened_at = self.heard_at = time.monotonic()

    def send(self, name, **values):
        with retried():
            self.socket.sendall(encode(name, **values))

    def receive(self, deadline):
        """The next message, or None if there is none by then. What has arrived is taken in any case."""
        while True:
            message = self.reader.next()
            if message:
                return message
            readable, _, _ = select.select([self.socket], [], [], max(0, deadline - time.monotonic()))
            if not readable:
                return None
            with retried():
                data = self.socket.recv(1 << 18)
            if not data:
                raise Retry("the origin closed the connection")
            self.heard_at = time.monotonic()
            self.reader.push(data)

    def close(self, farewell=None, **values):
        with contextlib.suppress(Retry):
            if farewell:
                self.send(farewell, **values)
        self.socket.close()


@contextlib.contextmanager
def retried():
    """What the network refuses is tried again, unlike what the disk refuses."""
    try:
        yield
    except OSError as why:
        raise Retry(str(why) or type(why).__name__) from None


def connect(address, allow_plain_tcp, within_s):
    """The first of the addresses, resolved anew, that accepts."""
    host, port = split_address(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = [place for place in found if allow_plain_tcp or is_loopback(place[4][0])]
    if not allowed:
        raise Halt("PLAIN_TCP", f"{address} is off the loopback, and nothing is encrypted: --allow-plain-tcp")
    error = None
    for family, kind, protocol, _, place in allowed:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(within_s)
            connection.connect(place)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as why:
            connection.close()
            error = why
    raise error


def is_loopback(host):
    address = ipaddress.ip_address(host.split("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def split_address(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


# ------------------------------------------------------------------------------------------------- verification


class Intake:
    """Takes SEGMENT and DATA in; only what continues the mirror gets into it."""

    def __init__(self, mirror, durable, window, unsynced):
        self.mirror, self.window = mirror, window
        self.unsynced = unsynced  # takes the batches that are written
        self.durable = durable.offset, durable.position  # of the origin, as told last
        self.next_offset = mirror.end.offset
        self.segment, self.is_opening = mirror.segment, False
        self.part = bytearray()  # the beginning of a batch that is longer than a frame

    def take_segment(self, message):
        demand(not self.part, "SEGMENT within a batch")
        demand(not self.is_opening, "SEGMENT behind SEGMENT")
        try:
            self.segment = self._read_page(message.page)
        except Invalid as why:
            raise BadBytes(f"segment header: {why}") from None
        self.is_opening = True
        self.mirror.begin_segment(self.segment, message.page)

    def _read_page(self, page):
        copy, end = page[:HEADER_COPY], self.mirror.end
        read_journal.check(copy == page[HEADER_COPY : 2 * HEADER_COPY], "copies that differ")
        read_journal.check(not any(page[2 * HEADER_COPY :]), "bytes behind the copies")
        number = self.segment.number + 1 if self.segment else self.mirror.first_segment
        path = self.mirror.segment_path(number)
        segment = Segment(path, number, read_journal.read_header(path, page), b"")
        read_journal.check(segment.journal == end.journal, "another journal")
        read_journal.check(segment.start == end.place, "it doesn't begin at the end")
        read_journal.check(HEADER_PAGE <= segment.capacity <= SEGMENT_BYTES_MAX, "capacity")
        return segment

    def take_data(self, message):
        self._check_place(message)
        demand(self.segment, "DATA in front of SEGMENT")
        if self.part or message.continued:
            self._take_part(message)
        else:
            self._take_batches(message.data)

    def _check_place(self, message):
        end = message.offset + len(message.data)
        demand(message.data, "DATA without a byte")
        demand(message.offset == self.next_offset, "DATA doesn't begin where the last one ended")
        self.tell_durable(message.durable_offset, message.durable_position)
        demand(end <= self.durable[0], "DATA passes the durable end")
        demand(end - self.mirror.durable.offset <= self.window + BATCH_LENGTH_MAX, "DATA passes the window")
        self.next_offset = end

    def tell_durable(self, offset, position):
        demand(offset >= self.durable[0] and position >= self.durable[1], "the durable end goes back")
        self.durable = offset, position

    def _take_batches(self, data):
        at = 0
        while at < len(data):
            length = claimed_length(data, at)
            demand(at + length <= len(data), "a batch is longer than what is there")
            self._take_batch(data[at : at + length])
            at += length

    def _take_part(self, message):
        self.part += message.data
        length = claimed_length(self.part, 0)
        if message.continued:
            demand(len(self.part) < length, "a batch is shorter than its parts")
            return
        demand(len(self.part) == length, "a batch isn't as long as its parts")
        data, self.part = bytes(self.part), bytearray()
        self._take_batch(data)

    def _take_batch(self, data):
        end = self.mirror.end
        try:
            batch = self.segment.read_batch(data, 0)
            batch.check_continues(end.place, self.segment if self.is_opening else None)
            batch.shown = batch.records()
        except Invalid as why:
            raise BadBytes(str(why)) from None
        new_end = batch.end(end.journal)
        self._check_witness(new_end)
        demand(new_end.position <= self.durable[1], "a batch passes the durable position")
        self.mirror.append(data, new_end)
        self.unsynced.append(batch)
        self.is_opening = False

    def _check_witness(self, end):
        witness = self.mirror.witness
        if witness and end.offset >= witness.offset and end.place != witness:
            raise Replaced(witness)


def claimed_length(data, at):
    """A batch's length with padding, as its header says: not verified yet, but within limits."""
    demand(len(data) >= at + 128, "a cut batch header")
    length = struct.unpack_from("<I", data, at + 60)[0]
    demand(128 <= length <= BATCH_LENGTH_MAX, "a batch's length is out of limits")
    return length


# ------------------------------------------------------------------------------------------------------ session


class Session:
    """One connection, from HELLO to its end."""

    def __init__(self, options, mirror, output, stop):
        self.options, self.mirror, self.output, self.stop = options, mirror, output, stop
        self.connection = Connection(options.origin, options.allow_plain_tcp)
        self.unsynced = []  # batches that are written
        self.intake, self.had = None, mirror.end
        self.handlers = {"SEGMENT": self._on_segment, "DATA": self._on_data, "HEARTBEAT": self._on_heartbeat}

    def run(self):
        """Follows until it is to stop; everything else is an exception."""
        try:
            welcome = self._greet()
            self._subscribe(welcome)
            self._stream()
            self.connection.close("GOAWAY", wait_ms=0)
        except (Halt, Retry) as why:
            self._settle()
            self._answer(why.answer, why)
            raise
        except Unsupported as why:
            self._answer("REFUSED", why)
            raise
        except OSError as why:
            self._answer("STORAGE", why)
            raise
        finally:
            self.connection.close()

    def _answer(self, code, why):
        if code is None:
            return
        position = self.mirror.end.position if self.mirror.end else UNKNOWN
        self.connection.close(
            "ERROR",
            code=ERROR_CODES[code],
            lowest=VERSION,
            highest=VERSION,
            wait_ms=0,
            position=position,
            detail=printable(str(why)).encode("ascii", "replace")[:512],
        )

    def went_well(self):
        """It brought something, or was live, or held for a while."""
        is_live = self.intake and self.mirror.end.offset == self.intake.durable[0]
        return self.mirror.end != self.had or is_live or time.monotonic() - self.connection.opened_at >= HEALTHY_AFTER_S

    def _greet(self):
        nonce = os.urandom(16)
        self.connection.send(
            "HELLO",
            magic=HELLO_MAGIC,
            lowest=VERSION,
            highest=VERSION,
            features=0,
            frame_max=FRAME_BYTES_MAX,
            node=self.mirror.node or bytes(16),
            nonce=nonce,
            authentication_kind=0,
            authentication=b"",
            agent=AGENT,
        )
        welcome = self._expect(self.connection.opened_at + WELCOME_WITHIN_S, "WELCOME")
        demand(welcome.nonce == nonce, "another nonce")
        demand(welcome.version == VERSION, "a version that wasn't offered")
        demand(welcome.features == 0, "features that weren't offered")
        demand(DATA_FRAME_BYTES_MIN <= welcome.frame_max <= FRAME_BYTES_MAX, "a frame limit that wasn't offered")
        if welcome.node == self.mirror.node:
            raise Retry("CYCLE: the origin has this mirror's own node id")
        self.connection.reader.data_bytes_max = welcome.frame_max
        return welcome

    def _subscribe(self, welcome):
        end, witness = self._place(), self.mirror.witness if self.mirror.journal else None
        self.connection.send(
            "SUBSCRIBE",
            end=end,
            mode=0,
            flags=HAS_WITNESS if witness else 0,
            window=self.options.window,
            witness_offset=witness.offset if witness else 0,
            witness_position=witness.position if witness else 0,
            witness_chain=witness.chain if witness else bytes(16),
        )
        answer = self._expect(time.monotonic() + ANSWER_WITHIN_S, "SUBSCRIBED", "DIVERGED")
        if answer.name == "DIVERGED":
            raise diverged(answer, end)
        self._check_subscribed(answer, end)
        if self.mirror.journal is None:
            self.mirror.create(answer.durable.journal)
        self.intake = Intake(self.mirror, answer.durable, self.options.window, self.unsynced)
        self.output.say(
            "connected",
            f"connected to {self.options.origin}: events from {self.mirror.end.position}, there are {answer.durable.position}",
            origin=text_id(welcome.node),
            journal=text_id(self.mirror.journal),
            position=self.mirror.end.position,
            origin_position=answer.durable.position,
        )
        self._acknowledge()

    def _place(self):
        """The end of what is written; without a mirror the beginning of the journal that is asked for, or of any."""
        if self.mirror.journal:
            return self.mirror.end
        return genesis(self.options.journal) if self.options.journal else None

    def _check_subscribed(self, answer, end):
        if end:
            durable = answer.durable
            demand(durable.journal == end.journal, "another journal")
            demand(durable.offset >= end.offset and durable.position >= end.position, "an end in front of the mirror's")
        if self.mirror.node in answer.path:
            raise Retry("CYCLE: the path leads back to this mirror")
        if answer.first_position > (end.position if end else 0):
            raise Halt("TRUNCATED", f"events in front of position {answer.first_position} have been removed")

    def _expect(self, deadline, *names):
        message = self.connection.receive(deadline)
        if message is None:
            raise Late(f"no {names[0]} in time")
        self._check_end(message)
        demand(message.name in names, f"{message.name} instead of {names[0]}")
        return message

    def _check_end(self, message):
        """Raises what ERROR and GOAWAY mean; they may come at any time."""
        if message.name == "GOAWAY":
            raise Retry("the origin goes away", message.wait_ms)
        if message.name == "ERROR":
            raise error_of(message)

    def _stream(self):
        while not self._is_done():
            message = self.connection.receive(self._deadline())
            if message:
                self._check_end(message)
                demand(message.name in self.handlers, f"{message.name} while streaming")
                self.handlers[message.name](message)
            if self._should_acknowledge(message):
                self._acknowledge()
            elif message is None and time.monotonic() - self.connection.heard_at >= SILENCE_MAX_S:
                raise Late("the origin is silent")
        self._acknowledge()

    def _is_done(self):
        until, durable = self.options.until, self.mirror.durable
        return self.stop.is_set() or (until is not None and durable.position >= until)

    def _deadline(self):
        """Up to when the next message is waited for; not at all if there is something to be synced."""
        if self.unsynced:
            return 0
        return min(self.acknowledged_at + ACK_EVERY_S, self.connection.heard_at + SILENCE_MAX_S)

    def _should_acknowledge(self, message):
        if self.unsynced:
            unsynced_bytes = self.mirror.end.offset - self.mirror.durable.offset
            if message is None or 2 * unsynced_bytes >= self.options.window:
                return True
        return time.monotonic() >= self.acknowledged_at + ACK_EVERY_S

    def _acknowledge(self):
        self._settle()
        self.connection.send("ACK", durable=self.mirror.durable, applied=UNKNOWN, echo=NO_ECHO)
        self.acknowledged_at = time.monotonic()

    def _settle(self):
        """Makes durable what is written, and shows it."""
        if self.unsynced:
            self.mirror.sync()
            self.output.events(self.unsynced)
            self.output.durable(self.mirror.durable)
            self.unsynced.clear()

    def _on_segment(self, message):
        self.intake.take_segment(message)

    def _on_data(self, message):
        self.intake.take_data(message)

    def _on_heartbeat(self, message):
        durable, end = message.durable, self.mirror.end
        demand(durable.journal == end.journal, "the heartbeat of another journal")
        demand(durable.offset != end.offset or durable == end, "the heartbeat of another history")
        demand(message.echo == NO_ECHO, "an echo of what was not sent")
        self.intake.tell_durable(durable.offset, durable.position)


def diverged(answer, end):
    if answer.reason not in DIVERGED or answer.flags & ~(AT_WITNESS | COMMON_KNOWN):
        return Breach(f"DIVERGED for an unknown reason: {answer.reason}, flags {answer.flags}")
    name = DIVERGED[answer.reason]
    durable = answer.durable
    what = {
        "AHEAD": "the mirror has more than the origin, which may have been restored from an older copy",
        "FORK": "the origin has another history than the mirror, and may have been restored from an older copy",
        "FOREIGN": f"the origin serves another journal: {text_id(durable.journal)}",
    }[name]
    where = f"mirror at {end.position}, origin at {durable.position}" if end else f"origin at {durable.position}"
    if answer.flags & AT_WITNESS:
        where += ", found at the end of a tail that was set aside"
    if answer.flags & COMMON_KNOWN:
        where += f", in common up to {answer.common_position}"
    if name == "FORK" and answer.speaker == RELAY_APART:
        return Retry(f"FORK: {what} ({where}); says a relay that doesn't hear from the origin")
    return Halt(name, f"{what} ({where}). The mirror is kept as it is; it may hold the only copy of events.")


def error_of(message):
    name = ERRORS.get(message.code, f"error {message.code}")
    what = f"{name}: {printable(message.detail.decode('utf-8', 'replace'))}"
    if message.position != UNKNOWN:
        what += f" (position {message.position})"
    if name == "VERSION":
        what += f" (the origin speaks {message.lowest} to {message.highest}, this program {VERSION})"
    return Halt(name, what) if name in HALTING else Retry(what, message.wait_ms)


def printable(text):
    return "".join(char if unicodedata.category(char) != "Cc" else "?" for char in text)


# -------------------------------------------------------------------------------------------------------- output


class Output:
    """For people: events on standard output, everything else on standard error."""

    def events(self, batches):
        for batch in batches:
            for record in batch.shown:
                self.event(record)
        sys.stdout.flush()

    def event(self, record):
        print(record["position"], record["stream"], record["type"])

    def durable(self, end):
        pass

    def say(self, kind, text, **values):
        print(text, file=sys.stderr, flush=True)


class JsonOutput(Output):
    """For programs."""

    def event(self, record):
        print(json.dumps({"kind": "event", **record}))

    def durable(self, end):
        self.say("durable", "", position=end.position, offset=end.offset)

    def say(self, kind, text, **values):
        print(json.dumps({"kind": kind, **values, **({"text": text} if text else {})}), flush=True)


# ---------------------------------------------------------------------------------------------------- following


class Follower:
    """Session after session, until it is done or has to halt."""

    def __init__(self, options, mirror, output, stop):
        self.options, self.mirror, self.output, self.stop = options, mirror, output, stop
        self.failures = 0  # in a row
        self.refusals = None, 0  # at which offset, and how often in a row

    def run(self):
        while not self.stop.is_set():
            session = None
            try:
                session = Session(self.options, self.mirror, self.output, self.stop)
                return session.run()
            except BadBytes as why:
                self._count_refusal(why)
                self._wait(session, f"what the origin sent doesn't continue the mirror: {why}", 0)
            except Retry as why:
                self._wait(session, str(why), why.wait_ms)

    def _count_refusal(self, why):
        """Damage on the way heals; what fails again and again in the same place wasn't damaged on the way."""
        end = self.mirror.end
        count = self.refusals[1] + 1 if self.refusals[0] == end.offset else 1
        self.refusals = end.offset, count
        if count >= REFUSALS_MAX:
            raise Halt("REFUSED", f"{count} times, at position {end.position}: {why}")

    def _wait(self, session, why, wait_ms):
        self.failures = 0 if session and session.went_well() else self.failures
        back_off_s = min(BACK_OFF_MAX_S, BACK_OFF_MIN_S * 2**self.failures) * (1 + random.random())
        self.failures = min(self.failures + 1, 16)
        wait_s = max(back_off_s, min(ASKED_WAIT_MAX_S, wait_ms / 1000))
        self.output.say("retry", f"{why}; again in {wait_s:.1f} s", wait_ms=round(wait_s * 1000))
        self.stop.wait(wait_s)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("origin", type=address_argument)
    parser.add_argument("--mirror", metavar="DIR")
    parser.add_argument("--journal", metavar="ID", type=lambda text: uuid.UUID(text).bytes)
    parser.add_argument("--until", metavar="POSITION", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--window", metavar="BYTES", type=window_argument, default=4 << 20)
    parser.add_argument("--allow-plain-tcp", action="store_true")
    return parser.parse_args(arguments)


def address_argument(text):
    host, port = split_address(text)
    if not host or not 0 < port < 1 << 16:
        raise ValueError(text)
    return text


def window_argument(text):
    if not 1 <= int(text) < 1 << 32:
        raise ValueError(text)
    return int(text)


def follow(options, output, stop):
    with contextlib.ExitStack() as stack:
        directory = options.mirror or stack.enter_context(tempfile.TemporaryDirectory())
        mirror = Mirror(directory)
        if options.journal and mirror.journal not in (None, options.journal):
            raise Halt("FOREIGN", f"{directory} is a mirror of another journal: {text_id(mirror.journal)}")
        try:
            Follower(options, mirror, output, stop).run()
        except Halt:
            mirror.close()
            raise
        mirror.close()
        position = mirror.end.position if mirror.end else 0
        output.say("done", f"stopped at position {position}", position=position)


def main(arguments):
    options = parse(arguments)
    output = JsonOutput() if options.json else Output()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        follow(options, output, stop)
        return 0
    except Halt as halt:
        output.say("halted", f"{halt.name}: {halt}", code=halt.name, exit_code=halt.exit_code)
        return halt.exit_code
    except read_journal.Damage as why:
        output.say("failed", f"damage: {why}", exit_code=3)
        return 3
    except BrokenPipeError:  # nobody reads the output any more; the mirror is what it is
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, Unsupported) as why:
        output.say("failed", f"error: {why}", exit_code=1)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
