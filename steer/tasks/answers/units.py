r"""What people write around a value: units of measure, currency and short remarks.

Works on text from `steer.tasks.answers.latex.normalise`, in which `\text{cm}` is `"cm"`.
"""

from __future__ import annotations

import re
from fractions import Fraction

Unit = tuple[tuple[str, int], ...]  # (name, power), sorted; () without a unit
Around = tuple[Unit, frozenset[str]]  # the unit, and other words behind a value

# --- words --------------------------------------------------------------------------------------------------

_COUNTING = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
"""
_ONES, _TENS = _COUNTING.split()[:20], _COUNTING.split()[20:]
NUMBER_WORDS = {word: value for value, word in enumerate(_ONES)}
NUMBER_WORDS |= {ten: 20 + 10 * place for place, ten in enumerate(_TENS)}
NUMBER_WORDS |= {
    f"{ten}-{_ONES[one]}": 20 + 10 * place + one for place, ten in enumerate(_TENS) for one in range(1, 10)
}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES["trillion"] = 10**12

_NAMES = """
mm millimeter millimeters millimetre millimetres
cm centimeter centimeters centimetre centimetres
m meter meters metre metres
km kilometer kilometers kilometre kilometres
nm nanometer nanometers
inch in inches
foot ft feet
yard yd yds yards
mile mi miles
mg milligram milligrams
g gram grams
kg kilogram kilograms
lb lbs pound pounds
oz ounce ounces
ton tons tonne tonnes
s sec secs second seconds
min mins minute minutes
h hr hrs hour hours
day days
week weeks wk
month months
year years yr yrs
dollar dollars usd buck bucks
cent cents
euro euros eur
l L liter liters litre litres
ml mL milliliter milliliters
gallon gallons gal
acre acres
degree degrees deg
radian radians rad
percent percents pct
N newton newtons
J joule joules
W watt watts
V volt volts
A amp amps ampere amperes
K kelvin kelvins
Hz hertz
Pa pascal pascals
erg ergs
mol mole moles
eV
"""
_UNITS = {name: names.split()[0] for names in _NAMES.strip().splitlines() for name in names.split()}
_SPEEDS = {"mph": ("mile", "h"), "kph": ("km", "h"), "kmh": ("km", "h")}
CURRENCY = {"\\$": "dollar", "€": "euro", "£": "poundsterling"}

# Words that change what the number before them says, or offer another one
_CHANGING_WORDS = """
or not if unless except than maybe either neither plus minus divided factorial mod modulo base half halves
third thirds fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths least most negative
opposite reciprocal inverse vs versus isn't
"""
_CHANGING = frozenset(_CHANGING_WORDS.split())
_CHANGING_FIRST = ("squared", "cubed", "over", "by", "to", "root", "roots", "choose")
# "1 tenth" and "5 and a quarter" are other numbers; "16 quarters" may be coins, and so may "1 quarter"
_TENTHS = ("fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "hundredth", "thousandth")
_FRACTIONS = ("half", "third", "quarter", *_TENTHS)
# "3 times" and "3 times as many"; "3 times eight" is a product
_BEHIND_TIMES = ("as", "a", "an", "per", "each", "every", "more", "larger", "greater", "longer", "faster")
# Words too short to tell from a product of letters, which stand between other words
_SMALL = ("of", "a", "an", "to", "on", "at")
_LEADING = re.compile(
    r"(?:(?:is|it's|it is|are|was) )?(?:about|approximately|approx\.?|roughly|around|exactly|only|just|total|"
    r"a total of|total of|answer|the answer|final answer|sum)?"
)
_HEDGES = re.compile(r"\b(?:not|or|no|never|than|less|more|least|most|if|except|wrong|false|\w+n't|e\.?g)\b")


def harmless_lead(words: str) -> bool:
    """Whether words in front of an answer only introduce it: "about", "The answer is", "m + n ="."""
    words = words.strip().lower()
    if any(c.isdigit() for c in words) or _HEDGES.search(words):
        return False
    if words.endswith(("=", ":")) or words.split()[-1:] in (["is"], ["are"], ["equals"]):
        return True
    return _LEADING.fullmatch(words) is not None


def changes_number(words: str) -> bool:
    """Whether words beside a number may make it another one: "million", "and a quarter", "negative", "%"."""
    words = re.sub(r"\bnearest +[a-z]+", "", words.lower())  # "to the nearest tenth" changes nothing
    return "%" in words or any(
        word in _CHANGING
        or word.removesuffix("s") in (*_SCALES, *_FRACTIONS)
        or _UNITS.get(word) == "percent"
        for word in re.findall("[a-z']+", words)
    )


# --- units --------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"(?P<degree>\^\\circ|\^\{\\circ\}|\\circ|\\degree|°)|(?P<percent>\\?%)|(?P<check>\\checkmark|✓|\\blacksquare)"
    r"|\^\{?(?P<power>-?[0-9])\}?(?![0-9])|(?P<divide>/)|(?P<times>\\cdot|\*|·)|(?P<space>[ ,.!]+)"
    r"|(?P<money>\\\$|€|£)|(?P<word>[A-Za-zµ][A-Za-z.'’\-]*)|(?P<bracket>[()\[\]])"
)


class _Remainder:
    """Reads what follows a number; `ok` turns False at anything but units and harmless words."""

    def __init__(self, value: Fraction, in_words: bool) -> None:
        self.value = value
        self.in_words = in_words
        self.scale = 1
        self.ok = True
        self.units: dict[str, int] = {}
        self.nouns: set[str] = set()
        self.last: str | None = None  # the unit that an exponent would belong to
        self.sign = 1
        self.power = 1  # from "square" and "cubic"
        self.said: list[str] = []  # the words so far

    def read(self, text: str, quoted: bool, spaced: bool) -> None:
        """text: words and unit symbols. quoted: it was in \text. spaced: a space is before it."""
        place = 0
        words = list(_TOKEN.finditer(text))
        for number, match in enumerate(words):
            if match.start() != place:
                self.ok = False
                return
            place = match.end()
            kind = match.lastgroup
            if kind == "space":
                self.ok &= "!" not in match[0] or (bool(self.said) and (quoted or self.in_words))
                spaced = True
                continue
            if kind == "word":
                following = next((w[0] for w in words[number + 1 :] if w.lastgroup == "word"), "")
                self._word(match[0], quoted, spaced, following)
            elif kind == "degree":
                self._unit("degree")
            elif kind == "percent":
                self._unit("percent")
            elif kind == "money":
                self._unit(CURRENCY[match[0]])
            elif kind == "power":
                self._exponent(int(match["power"]))
            elif kind == "divide":
                self.ok &= self.last is not None or bool(self.said)
                self.sign = -1
            elif kind == "times":
                self.ok &= self.last is not None
            elif kind == "bracket":
                self.ok &= quoted
            spaced = kind == "bracket"
        self.ok &= place == len(text)

    def _exponent(self, power: int) -> None:
        if self.last is None:  # an exponent of the number itself
            self.ok = False
        elif self.last in self.units:
            self.units[self.last] *= power

    def _unit(self, name: str) -> None:
        self.units[name] = self.units.get(name, 0) + self.sign * self.power
        self.last, self.power = name, 1

    def _word(self, raw: str, quoted: bool, spaced: bool, following: str) -> None:
        raw = raw.replace(".", "").rstrip("'’-")
        word = raw.lower()
        first = not self.said and not self.units
        before = self.said[-1:]
        self.said += word.split("-")
        multiplied = before == ["times"] and not self._goes_on(raw, quoted, following)
        changing = word in _CHANGING or (first and word in _CHANGING_FIRST)
        if changing or multiplied or self._is_fraction(word, first, following):
            self.ok = False
        elif word in _SCALES or word.removesuffix("s") in _SCALES:
            if len(self.said) > 1 and not (first or self.scale > 1):
                self.ok = False
            self.scale *= _SCALES.get(word) or _SCALES[word.removesuffix("s")]
        elif word in NUMBER_WORDS:  # "5 (five)", "3 two digit numbers"; not "5, six"
            names = bool(following) and (quoted or before != ["of"])
            self.ok &= names or self.value == NUMBER_WORDS[word]
        elif word == "per":
            self.sign = -1
        elif word in ("square", "sq"):
            self.power = 2
        elif word in ("cubic", "cu"):
            self.power = 3
        elif word in ("squared", "cubed"):
            self._exponent(2 if word == "squared" else 3)
        elif word in _SPEEDS:
            above, below = _SPEEDS[word]
            self._unit(above)
            self.sign = -1
            self._unit(below)
        elif raw in _UNITS or (len(word) > 1 and word in _UNITS):
            # "5m" could be five times m
            self.ok &= quoted or spaced or len(word) > 1 or self.last is not None
            self._unit(_UNITS.get(raw) or _UNITS[word])
        else:
            self.ok &= quoted or (spaced and self._is_word(word, following))
            self.ok &= quoted or self.last is None or raw not in ("x", "y", "z")
            if self.last == "degree" and raw in ("C", "F", "c", "f"):
                self.ok = self.ok or len(raw) == 1
            self.nouns.add(word.removesuffix("s"))
            self.last, self.power = word, 1

    def _is_fraction(self, word: str, first: bool, following: str) -> bool:
        """Whether the last word makes another number: "1 tenth (of a mile)", "5 and a quarter"."""
        part = self.said[-1].removesuffix("s") in _FRACTIONS
        if first or len(self.said) < 3:
            return first and ((word in _TENTHS and not following) or (part and following == "of"))
        joint, count = self.said[-3:-1]
        return part and joint in ("and", "times") and (count in ("a", "an") or count in NUMBER_WORDS)

    def _goes_on(self, word: str, quoted: bool, following: str) -> bool:
        """Whether a word behind "times" is not what the number is multiplied by."""
        return (quoted or self.in_words) and word in _BEHIND_TIMES and (bool(following) or len(word) > 3)

    def _is_word(self, word: str, following: str) -> bool:
        r"""Whether letters outside of \text are a word: one has a vowel, "5 xyz" is a product."""
        if word in ("am", "pm"):
            return True
        if word in _SMALL:
            return bool(following) and (self.in_words or word != "a" or len(self.said) > 1)
        return len(word) > 2 and (self.in_words or re.search("[aeiouy]", word) is not None)


_PIECE = re.compile(r'"([^"]*)"|\(([A-Za-z .\'-]+)\)')
_BRACKETED = re.compile(r'[(\[]("[^"]*")[)\]]')
_UNIT_FRACTION = re.compile(r'\\frac\{("[^"]*"(?:\^\{?[0-9]\}?)?)\}\{("[^"]*"(?:\^\{?[0-9]\}?)?)\}')
_QUOTED_DEGREE = re.compile(r'(\^\{?\\circ\}?|°|\\degree) ?"?([CF])"?(?![A-Za-z])')


def read_units(text: str, value: Fraction, in_words: bool = False) -> tuple[int, Around] | None:
    r"""Scale ("million"), unit and other words of the text behind a number; None when it is more than that.

    value: the number, which words such as "(five)" may repeat. in_words: the number is in \text as well.
    """
    text = _BRACKETED.sub(r"\1", text)
    text = _UNIT_FRACTION.sub(r"\1/\2", text)
    text = _QUOTED_DEGREE.sub(r'\1"\2elsius"', text)
    text = re.sub(r'\^\{?"(th|st|nd|rd)"\}?', r'"\1"', text)
    reader, place = _Remainder(value, in_words), 0
    for match in _PIECE.finditer(text):
        before = text[place : match.start()]
        reader.read(before, quoted=False, spaced=place > 0)
        reader.read(match[1] if match[1] is not None else match[2], quoted=True, spaced=True)
        place = match.end()
    reader.read(text[place:], quoted=False, spaced=place > 0)
    if not reader.ok or reader.power != 1:
        return None
    return reader.scale, (tuple(sorted(reader.units.items())), frozenset(reader.nouns))


def conflict(gold: Around, answer: Around) -> bool:
    """Whether both have a unit, or both other words behind them, and these differ."""
    (units, nouns), (units2, nouns2) = gold, answer
    if units and units2:
        return units != units2
    if any(name != "percent" for name, _ in units + units2):
        return False
    return bool(nouns and nouns2 and not nouns & nouns2)
