"""The process that speaks: ``python espeak_worker.py LIBRARY DATA < requests > samples``. Started by ``espeak.py``.

eSpeak NG keeps global state (flutter, echo, random numbers) from one utterance to the next, so what a word sounds like
would depend on everything said before. Here every request is rendered by a fork of one freshly initialised engine:
the same request gives the same samples, always. Only the standard library is imported, which keeps the forks cheap.

Input: one JSON list [voice, rate, pitch, range, text] a line. Output for each: int32 n, then n int16 samples at the
engine's rate; n = -1 when the voice does not exist. The first int32 of all is that sample rate.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 3, 4
_POSITION_CHARACTER = 1
_UTF8 = 1
_SEED = 1
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


def render(library: ctypes.CDLL, voice: str, rate: int, pitch: int, pitch_range: int, text: str) -> bytes:
    """One utterance in the output format of this module."""
    chunks: list[bytes] = []

    def collect(samples: int | None, count: int, _events: int) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = _Callback(collect)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        return struct.pack("<i", -1)
    for parameter, value in ((_PARAMETER_RATE, rate), (_PARAMETER_PITCH, pitch), (_PARAMETER_RANGE, pitch_range)):
        library.espeak_SetParameter(parameter, value, 0)
    data = text.encode() + b"\0"
    library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    samples = b"".join(chunks)
    return struct.pack("<i", len(samples) // 2) + samples


def write_all(data: bytes) -> None:
    """To standard output, unbuffered: a fork must not leave half of its samples in a buffer."""
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def main(library_path: str, data_path: str) -> int:
    library = ctypes.CDLL(library_path)
    sample_rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path.encode(), _DONT_EXIT)
    if sample_rate <= 0:
        return 3
    library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
    library.espeak_SetVoiceByName(b"gmw/en")  # loads the English dictionary once, for all forks
    write_all(struct.pack("<i", sample_rate))
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            write_all(render(library, *json.loads(line)))
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            return 4
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
