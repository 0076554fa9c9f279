"""The messages of the subscriber in Python are those of the golden captures; what it does is in tests/it/python_subscriber.rs."""

import glob
import os
import random
import struct
import sys
import unittest
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CAPTURES = os.path.join(ROOT, "tests", "golden", "v1", "wire", "*.txt")
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(ROOT, "examples", "python"))

import shipping_messages as messages  # noqa: E402
import slow_blake3  # noqa: E402

try:
    import blake3
except ImportError:
    blake3 = None


def captured():
    """(name, bytes) of every frame of every capture."""
    for path in sorted(glob.glob(CAPTURES)):
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.startswith("#"):
                    _sender, name, hexadecimal = line.split()
                    yield name, bytes.fromhex(hexadecimal)


def reader():
    frames = messages.FrameReader()
    frames.data_bytes_max = 8192
    return frames


class Messages(unittest.TestCase):
    def test_every_captured_frame_is_read_and_written_again_as_it_was(self):
        names = set()
        for name, frame in captured():
            frames = reader()
            for at in range(len(frame) - 1):  # byte by byte: nothing before it is whole
                frames.push(frame[at : at + 1])
                self.assertIsNone(frames.next())
            frames.push(frame[-1:])
            message = frames.next()
            self.assertEqual(message.name, name)
            self.assertIsNone(frames.next())
            if name != "DATA":
                values = {key: value for key, value in vars(message).items() if key not in ("name", "continued")}
                self.assertEqual(messages.encode(**{"name": name, **values}), frame)
            names.add(name)
        self.assertEqual(names, set(messages.MESSAGES) - {"GOAWAY"})

    def test_a_flipped_bit_is_noticed_in_front_of_waiting_for_what_a_damaged_length_says(self):
        seed = random.randrange(2**32)
        chance = random.Random(seed)
        for name, frame in captured():
            covered = 12 + 32 if name == "DATA" else len(frame)
            for _ in range(20):
                damaged, bit = bytearray(frame), chance.randrange(8 * covered)
                damaged[bit // 8] ^= 1 << bit % 8
                frames = reader()
                frames.push(damaged + bytes(4096))
                with self.assertRaises(messages.Breach, msg=f"seed {seed}: {name}, bit {bit}"):
                    frames.next()

    def test_reserved_fields_lengths_and_flags_are_refused(self):
        go_away = messages.MESSAGES["GOAWAY"][0]
        for flags, payload in [(0, bytes(7) + b"\1"), (0, bytes(7)), (0, bytes(9)), (1, bytes(8)), (2, bytes(8))]:
            front = struct.pack("<IBBH", len(payload), go_away, flags, 0)
            frames = reader()
            frames.push(front + struct.pack("<I", zlib.crc32(front + payload)) + payload)
            with self.assertRaises(messages.Breach):
                frames.next()
        frames = reader()
        frames.push(messages.encode("GOAWAY", wait_ms=7))
        self.assertEqual(frames.next().wait_ms, 7)

    def test_data_is_refused_in_front_of_welcome_and_above_the_limit(self):
        for limit, length in ((None, 64), (8192, 8193)):
            frames = reader()
            frames.data_bytes_max = limit
            frames.push(struct.pack("<IBBHI", length, messages.MESSAGES["DATA"][0], 0, 0, 0))
            with self.assertRaises(messages.Breach):
                frames.next()


class Hash(unittest.TestCase):
    def test_known_hashes(self):
        known = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        self.assertEqual(slow_blake3.blake3().digest().hex(), known)

    @unittest.skipUnless(blake3, "the package blake3 is not installed")
    def test_it_is_the_hash_of_the_package(self):
        for length in (0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 3073, 8193, 31744, 102400):
            data = random.Random(length).randbytes(length)
            self.assertEqual(slow_blake3.blake3(data).digest(), blake3.blake3(data).digest(), length)


if __name__ == "__main__":
    unittest.main()
