"""Free speech synthesisers that tell when each phone ends: flite, Festival, eSpeak NG.

All are called as programs of the system (Debian: flite, festival, festvox-kallpc16k, festvox-kdlpc16k,
festvox-us-slt-hts, espeak-ng); one that is missing is left out. Phones come back in CMU's names (see visemes.py).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16000
FLITE_VOICES = ("slt", "rms", "awb", "kal16")
FESTIVAL_VOICES = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
ESPEAK_VOICES = (
    "en-us", "en-gb", "en-us+f2", "en-us+f4", "en-us+m3", "en-us+m5", "en-us+klatt2", "en-us+klatt4", "en-gb+f3", "en-gb+m7",
    "en-us+belinda", "en-us+paul", "en-gb+michael", "en-us+linda", "en-us+ed", "en-us+steph", "en-gb-scotland+m1",
)  # fmt: skip

# Festival's radio set and eSpeak's mnemonics to CMU's names; an unknown mnemonic of eSpeak lengthens the phone before it.
FESTIVAL_PHONES = {
    "dx": "d", "hv": "hh", "el": "l", "em": "m", "en": "n", "nx": "n", "axr": "er", "ix": "ih", "h#": "pau", "brth": "pau",
}  # fmt: skip
ESPEAK_PHONES = {
    "p": "p", "b": "b", "m": "m", "f": "f", "v": "v", "T": "th", "D": "dh", "t": "t", "t2": "t", "t#": "t", "d": "d",
    "n": "n", "l": "l", "L": "l", "s": "s", "z": "z", "S": "sh", "Z": "zh", "tS": "ch", "dZ": "jh", "k": "k", "g": "g",
    "N": "ng", "r": "r", "r-": "r", "r/": "r", "*": "d", "3": "er", "3:": "er", "i:": "iy", "i": "iy", "I": "ih",
    "I2": "ih", "I#": "ih", "j": "y", "E": "eh", "eI": "ey", "a": "ae", "aI": "ay", "aU": "aw", "A:": "aa", "A@": "aa",
    "A": "aa", "0": "aa", "0#": "aa", "V": "ah", "@": "ax", "@2": "ax", "@5": "ax", "a#": "ax", "@L": "l", "h": "hh",
    "O:": "ao", "O@": "ao", "O": "ao", "o@": "ao", "oU": "ow", "OI": "oy", "u:": "uw", "U": "uh", "U@": "uh", "w": "w",
    "e@": "eh", "i@": "iy", "i@3": "iy", "n-": "n", "?": "pau", "_": "pau", "_:": "pau", "aI@": "ay", "aI3": "ay",
    "aI2": "ay", "O2": "ao", "@-": "ax", "IR": "ih", "aa": "ae", "e": "eh", "u": "uw", "o": "ow", "x": "k", "C": "sh",
}  # fmt: skip


@dataclass(frozen=True)
class Utterance:
    """Mono sound at 16 kHz, samples in -1..1 [N], and phones as (name, start, end) in seconds."""

    samples: np.ndarray
    phones: tuple[tuple[str, float, float], ...]
    voice: str


def available_voices() -> list[str]:
    """Names "engine:voice" of what this machine can speak with."""
    voices = [f"flite:{name}" for name in FLITE_VOICES] if shutil.which("flite") else []
    if shutil.which("festival"):
        question = ["festival", "-b", "(print (voice.list))"]
        installed = subprocess.run(question, capture_output=True, text=True, check=False).stdout
        voices += [f"festival:{name}" for name in FESTIVAL_VOICES if name in installed]
    if ctypes.util.find_library("espeak-ng"):
        voices += [f"espeak:{name}" for name in ESPEAK_VOICES]
    return voices


def speak(voice: str, text: str, *, stretch: float = 1.0, pitch: float = 1.0, formants: float = 1.0) -> Utterance:
    """Speak a text.

    Args:
        voice: one of `available_voices()`.
        stretch: duration factor, 1.2 speaks slower by a fifth.
        pitch: factor on the voice's own mean pitch.
        formants: factor on all resonances: the voice speaks slower and lower by it and is then played faster, so
            that 1.15 sounds like a smaller head and 0.9 like a larger one, at the same rate and pitch.
    Raises RuntimeError when the synthesiser fails.
    """
    engine, name = voice.split(":", 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        phones = _ENGINES[engine](name, text, stretch * formants, pitch / formants, path)
        samples, rate = soundfile.read(path, dtype="float32")
    samples = soxr.resample(samples, rate * formants, SAMPLE_RATE)
    ends = [(phone, end / formants) for phone, end in phones]
    starts = [0.0] + [end for _, end in ends[:-1]]
    timed = tuple((phone, start, end) for (phone, end), start in zip(ends, starts, strict=True) if end > start)
    if not timed or len(samples) < SAMPLE_RATE // 2:
        raise RuntimeError(f"{voice} spoke nothing for {text!r}.")
    return Utterance(samples, timed, voice)


def _flite(name: str, text: str, stretch: float, pitch: float, path: Path) -> list[tuple[str, float]]:
    own_pitch = {"slt": 170, "rms": 95, "awb": 125, "kal16": 95}[name]
    settings = ["--setf", f"duration_stretch={stretch:.4f}", "--setf", f"int_f0_target_mean={own_pitch * pitch:.1f}"]
    command = ["flite", "-voice", name, *settings, "-t", text, "-psdur", "-o", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(f"flite failed: {out.stderr.strip() or out.returncode}.")
    pairs = (item.rsplit(":", 1) for item in out.stdout.split())
    return [(phone, float(end)) for phone, end in pairs]


def _festival(name: str, text: str, stretch: float, pitch: float, path: Path) -> list[tuple[str, float]]:
    labels = path.with_suffix(".lab")
    own_pitch = {"kal_diphone": 105, "ked_diphone": 105, "cmu_us_slt_arctic_hts": 170}[name]
    mean = f"(target_f0_mean {own_pitch * pitch:.1f})"
    intonation = f"(set! int_lr_params '({mean} (target_f0_std 14) (model_f0_mean 170) (model_f0_std 34)))"
    script = "\n".join((
        f"(voice_{name})",
        f"(Parameter.set 'Duration_Stretch {stretch:.4f})",
        intonation,
        f'(set! utt (Utterance Text "{text}"))',
        "(utt.synth utt)",
        f'(utt.save.wave utt "{path}" \'riff)',
        f'(utt.save.segs utt "{labels}")',
    ))  # fmt: skip
    script_path = path.with_suffix(".scm")
    script_path.write_text(script)
    out = subprocess.run(["festival", "-b", str(script_path)], capture_output=True, text=True, check=False)
    if out.returncode or not labels.exists():
        raise RuntimeError(f"festival failed: {out.stderr.strip() or out.returncode}.")
    rows = (line.split() for line in labels.read_text().splitlines() if not line.startswith("#"))
    return [(FESTIVAL_PHONES.get(phone, phone), float(end)) for end, _, phone in rows]


class _EspeakEvent(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int), ("sample", ctypes.c_int), ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    )  # fmt: skip


def _espeak(name: str, text: str, stretch: float, pitch: float, path: Path) -> list[tuple[str, float]]:
    retrieval, phoneme_events, phoneme_event, rate_parameter, pitch_parameter, utf8 = 1, 1, 7, 1, 3, 1
    library = ctypes.CDLL(ctypes.util.find_library("espeak-ng"))
    rate = library.espeak_Initialize(retrieval, 0, None, phoneme_events)
    if rate <= 0:
        raise RuntimeError("eSpeak NG did not start.")
    chunks: list[np.ndarray] = []
    starts: list[tuple[str, float]] = []

    def collect(samples, count: int, events) -> int:
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == phoneme_event:
                starts.append((events[i].id.decode("utf-8", "ignore"), events[i].audio_position / 1000))
            i += 1
        return 0

    samples_pointer, events_pointer = ctypes.POINTER(ctypes.c_short), ctypes.POINTER(_EspeakEvent)
    callback = ctypes.CFUNCTYPE(ctypes.c_int, samples_pointer, ctypes.c_int, events_pointer)(collect)
    library.espeak_SetSynthCallback(callback)
    library.espeak_SetVoiceByName(name.encode())
    library.espeak_SetParameter(rate_parameter, round(175 / stretch), 0)
    library.espeak_SetParameter(pitch_parameter, int(np.clip(50 * pitch, 0, 99)), 0)
    encoded = text.encode()
    library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, utf8, None, None)
    library.espeak_Synchronize()
    library.espeak_Terminate()
    if not chunks or not starts:
        raise RuntimeError("eSpeak NG spoke nothing.")
    samples = np.concatenate(chunks)
    soundfile.write(path, samples, rate, subtype="PCM_16")
    seconds = len(samples) / rate
    ends = [start for _, start in starts[1:]] + [seconds]
    phones: list[tuple[str, float]] = [("pau", starts[0][1])] if starts[0][1] > 0 else []
    for (mnemonic, _), end in zip(starts, ends, strict=True):
        known = ESPEAK_PHONES.get(mnemonic) or ESPEAK_PHONES.get(mnemonic.rstrip("#:-23")) or (mnemonic == "" and "pau")
        if known:
            phones.append((known, end))
        elif phones:
            phones[-1] = (phones[-1][0], end)
    return phones


_ENGINES = {"flite": _flite, "festival": _festival, "espeak": _espeak}
