"""A rough guess of a text's language: by script, and by its commonest little words where the script is Latin.

An estimate for the report, no more: short and mixed texts are often "unknown".
"""

import re
from collections import Counter

LOOK = 2000  # characters of a text that are looked at
_LEAST = 0.08  # share of little words below which a Latin text is unknown
_WORD = re.compile(r"[^\W\d_]+")

_LITTLE = {
    "English":
        "the and of to in is that it was for with as his on be at by this had not are but from have they "
        "you which she he or an were we there their been has when who will what if out so up about would "
        "into",
    "German":
        "der die und das ist nicht ich sie es den mit von dem ein eine zu auf für im sich des auch als wie "
        "er war aber so bei noch nach nur haben hat oder wenn sind wird werden einen aus an dass vor kann "
        "uns",
    "French":
        "le la les de des et un une du est que qui dans pour pas sur au ce il elle ne se plus par je vous "
        "nous avec son sa ses mais ou été cette comme sont tout aux on leur être fait si même ces sans "
        "était",
    "Spanish":
        "el la los las de y que en un una es se no por con para su lo como más pero sus le ya este porque "
        "entre cuando muy sin sobre también me hasta hay donde quien desde todo nos durante del al fue ser",
    "Italian":
        "il la le di e che un una è non per con si da del della in sono come più ma anche lo gli nel alla "
        "dei delle questo ha al dal suo sua io loro essere era quando se tra molto perché quella degli fu",
    "Portuguese":
        "o os as de e que um uma em não do da no na para com por se mais como mas foi ao ele das dos sua "
        "seu ou ser quando muito há nos já está eu também só pelo pela até isso ela entre era depois são",
    "Dutch":
        "de het een en van in is dat op te zijn met voor niet aan er om ook als dan maar bij uit naar door "
        "over ze nog wel geen werd hij zij ik je worden had wordt dit deze hun kan meer was tot heeft die",
    "Swedish":
        "och att det som en är på av för med till den har de inte om ett han men var jag sig från vi så "
        "kan när hon efter upp vid skulle där ut eller nu också över bara blev mot under ska mycket alla "
        "detta",
    "Polish":
        "w i na z się nie do to że jest o jak po co ale od za czy tak był jego już tym przez dla tylko są "
        "ich może być był która który oraz pod jej było kiedy bardzo więc mnie gdy nawet te został przed",
    "Turkish":
        "ve bir bu da de için ile o çok daha gibi ne var ben olarak sonra kadar ama en olan her şey değil "
        "mi ki ya ise oldu olduğu böyle bunu bana sen diye göre hiç nasıl ona onun tarafından iki zaman",
}
_SCRIPTS = (("Japanese", "぀", "ヿ"), ("Korean", "가", "힣"), ("Chinese", "一", "鿿"),
            ("Cyrillic script", "Ѐ", "ӿ"), ("Greek", "Ͱ", "Ͽ"), ("Arabic script", "؀", "ۿ"),
            ("Hebrew", "֐", "׿"), ("Devanagari script", "ऀ", "ॿ"), ("Thai", "฀", "๿"))


def _by_word() -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for language, words in _LITTLE.items():
        for word in set(words.split()):
            table.setdefault(word, []).append(language)
    return table


_LANGUAGES = _by_word()


def language(text: str) -> str:
    """The likeliest language of a text's first 2000 characters, or "unknown"."""
    text = text[:LOOK]
    script = None if text.isascii() else _script(text)
    if script:
        return script
    words = _WORD.findall(text.lower())
    votes = Counter(name for word in words for name in _LANGUAGES.get(word, ()))
    best, count = votes.most_common(1)[0] if votes else ("unknown", 0)
    return best if count > max(1, _LEAST * len(words)) else "unknown"


def _script(text: str) -> str | None:
    """The script other than Latin that most letters are of. Some kana make Han characters Japanese."""
    letters = [c for c in text if c.isalpha()]
    foreign = [c for c in letters if c > "\u036f"]
    counts = Counter(name for c in foreign for name, first, last in _SCRIPTS if first <= c <= last)
    if counts["Japanese"] * 10 > counts["Chinese"] > 0:
        counts["Japanese"] += counts.pop("Chinese")
    best, count = counts.most_common(1)[0] if counts else ("", 0)
    return best if count * 3 > len(letters) else None
