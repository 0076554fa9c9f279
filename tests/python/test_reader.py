"""The reader in Python, which was written from docs/format.md alone, reads the golden journals."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GOLDEN = os.path.join(ROOT, "tests", "golden", "v1")
SCRIPT = os.path.join(ROOT, "examples", "python", "read_journal.py")
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(SCRIPT))

import read_journal  # noqa: E402


def expected(journal):
    with open(os.path.join(GOLDEN, journal + ".ndjson"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class GoldenJournals(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)

    def copy(self, journal):
        target = os.path.join(self.directory, journal)
        shutil.copytree(os.path.join(GOLDEN, journal), target)
        return target

    def change(self, path, at, change):
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([change(byte)]))

    def test_every_event_is_read_as_it_was_written(self):
        for name in ("origin", "mirror", "trimmed"):
            journal = read_journal.Journal(os.path.join(GOLDEN, name))
            role = "mirror" if name == "mirror" else "origin"
            self.assertEqual((journal.role, journal.damage), (role, None))
            self.assertEqual(journal.first_position, 3 if name == "trimmed" else 0)
            self.assertEqual(journal.events, expected(name))

    def test_the_chain_is_verified(self):
        directory = self.copy("origin")
        path = os.path.join(directory, "0000000000000002.seg")
        with open(path, "r+b") as file:  # another payload under right checksums
            data = bytearray(file.read())
            at = data.index(b"18446744073709551615")
            data[at : at + 1] = b"2"
            length = int.from_bytes(data[4096 + 16 : 4096 + 20], "little")
            crc = read_journal.zlib.crc32(data[4096 + 128 : 4096 + 128 + length])
            data[4096 + 24 : 4096 + 28] = crc.to_bytes(4, "little")
            header = data[4096 : 4096 + 128]
            header[12:16] = bytes(4)
            crc = read_journal.zlib.crc32(data[88:96] + header)
            data[4096 + 12 : 4096 + 16] = crc.to_bytes(4, "little")
            file.seek(0)
            file.write(data)
        journal = read_journal.Journal(directory)
        self.assertIn("chain", journal.damage)

    def test_the_program_prints_the_events_as_json(self):
        run = subprocess.run([sys.executable, SCRIPT, os.path.join(GOLDEN, "origin")], capture_output=True, text=True)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertEqual([json.loads(line) for line in run.stdout.splitlines()], expected("origin"))
        self.assertIn("chain", run.stderr)
        missing = subprocess.run([sys.executable, SCRIPT, self.directory], capture_output=True, text=True)
        self.assertEqual(missing.returncode, 1)
        usage = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
        self.assertEqual(usage.returncode, 2)

    def test_a_flipped_bit_is_never_another_event(self):
        events = expected("origin")
        seed = random.randrange(2**32)
        chance = random.Random(seed)
        for _ in range(300):
            directory = self.copy("origin")
            file = chance.choice(["0000000000000000.seg", "0000000000000001.seg", "0000000000000002.seg"])
            path = os.path.join(directory, file)
            with open(path, "rb") as data:
                written = len(data.read().rstrip(b"\0"))
            at, bit = chance.randrange(written), chance.randrange(8)
            self.change(path, at, lambda byte: byte ^ 1 << bit)
            journal = read_journal.Journal(directory)
            place = f"seed {seed}: {file} byte {at} bit {bit}: {journal.damage}"
            self.assertEqual(journal.events, events[: len(journal.events)], place)
            if at >= 4096 or len(journal.events) < len(events):
                self.assertIsNotNone(journal.damage, place)
            shutil.rmtree(directory)

    def test_what_is_not_proven_is_not_shown(self):
        directory = self.copy("origin")
        os.remove(os.path.join(directory, "mark"))
        journal = read_journal.Journal(directory)
        self.assertIsNone(journal.damage)
        self.assertEqual(journal.events, expected("origin")[:6])  # nothing vouches for the last batch

    def test_one_damaged_header_copy_loses_nothing(self):
        for at in (24, 512 + 24):
            directory = self.copy("origin")
            self.change(os.path.join(directory, "0000000000000001.seg"), at, lambda byte: byte ^ 1)
            journal = read_journal.Journal(directory)
            self.assertEqual((journal.events, journal.damage), (expected("origin"), None))
            shutil.rmtree(directory)

    def test_a_lost_segment_is_damage(self):
        for number, left in ((0, 0), (1, 3), (2, 6)):
            directory = self.copy("origin")
            os.remove(os.path.join(directory, f"{number:016x}.seg"))
            journal = read_journal.Journal(directory)
            self.assertEqual(journal.events, expected("origin")[:left])
            self.assertIsNotNone(journal.damage)
            shutil.rmtree(directory)

    def test_a_base_with_one_valid_header_is_read_and_one_without_is_damage(self):
        directory = self.copy("trimmed")
        base = os.path.join(directory, "base")
        self.change(base, 60, lambda byte: byte ^ 1)
        journal = read_journal.Journal(directory)
        self.assertEqual((journal.events, journal.damage), (expected("trimmed"), None))
        self.change(base, 4096 + 100, lambda byte: byte ^ 1)
        with self.assertRaises(read_journal.Damage):
            read_journal.Journal(directory)
        os.remove(base)  # nothing says any more that segment 0 was removed
        journal = read_journal.Journal(directory)
        self.assertEqual(journal.events, [])
        self.assertIsNotNone(journal.damage)

    def test_segments_in_front_of_the_base_are_no_part_of_the_journal(self):
        directory = self.copy("trimmed")
        name = "0000000000000000.seg"
        shutil.copy(os.path.join(GOLDEN, "origin", name), os.path.join(directory, name))
        journal = read_journal.Journal(directory)
        self.assertEqual((journal.events, journal.damage), (expected("trimmed"), None))

    def test_a_later_version_is_refused_and_not_called_damaged(self):
        directory = self.copy("origin")
        path = os.path.join(directory, "0000000000000000.seg")
        with open(path, "r+b") as file:
            copy = bytearray(file.read(512))
            copy[8] = 2
            copy[508:] = read_journal.zlib.crc32(copy[:508]).to_bytes(4, "little")
            file.seek(0)
            file.write(copy)
        with self.assertRaises(read_journal.Unsupported):
            read_journal.Journal(directory)


if __name__ == "__main__":
    unittest.main()
