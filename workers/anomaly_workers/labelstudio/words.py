"""What the words of a label say: that something is wrong, that nothing is, or neither."""

from __future__ import annotations

import re
import unicodedata


def meaning(label: str) -> bool | None:
    """Return True for a label of something wrong, False for one of nothing wrong, None for any other."""
    words = folded(label)
    joined = "".join(words)
    if joined in _NORMAL or joined in _ANOMALY:
        return joined in _ANOMALY
    bad = any(word in _ANOMALY for word in words)
    good = any(word in _NORMAL for word in words)
    if bad == good:
        return None
    return bad != any(word in _NEGATIONS for word in words)


def agreement(label: str) -> bool | None:
    """Return True for yes, False for no, None for any other word."""
    joined = "".join(folded(label))
    return joined in _YES if joined in _YES | _NO else None


def folded(text: str) -> list[str]:
    """Return the words of a text: lower case, without accents and punctuation."""
    plain = "".join(
        char for char in unicodedata.normalize("NFD", text.casefold()) if unicodedata.category(char) != "Mn"
    )
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", plain).replace("ł", "l").replace("ı", "i"))


def _table(text: str) -> frozenset[str]:
    return frozenset("".join(folded(word)) for word in text.split())


# English, German, French, Spanish, Italian, Portuguese, Dutch, Polish, Czech, Swedish, Turkish, Russian, CJK.
_NORMAL = _table(
    """
    normal good ok okay io pass passed accept accepted clean healthy intact fine conforming conform flawless undamaged
    defect-free fault-free no-defect no-defects non-defective no-anomaly no-fault negative background
    gut i.O. in-ordnung fehlerfrei einwandfrei bon bonne conforme sain normale bueno buena correcto sano buono buona
    regolare bom boa são goed normaal dobry dobra normalny poprawny dobrý v-pořádku bra godkänd felfri
    iyi sağlam норма нормальный годен хорошо 正常 良品 合格 정상 양품
    """
)
_ANOMALY = _table(
    """
    anomaly anomalous anomalies abnormal abnormality defect defects defective bad nok n.i.O. ng not-ok no-good not-good
    fail failed failure fault faulty reject rejected damage damaged broken flaw flawed outlier scrap non-conforming
    not-normal positive anomalie anormal anormale auffällig fehler fehlerhaft defekt schlecht ausschuss schaden mangel
    mauvais défaut défectueux non-conforme anomalía anómalo anómala defecto defectuoso malo mala anomalia anomalo
    difetto difettoso cattivo scarto defeito defeituoso ruim afwijking fout slecht wada wadliwy zły vada špatný vadný
    avvikelse fel dålig kusur hatalı bozuk аномалия брак дефект плохо
    异常 異常 缺陷 欠陥 不良 不良品 不合格 不正常 이상 불량 결함
    """
)
_NEGATIONS = _table("no not non without free kein keine nicht ohne frei pas sans sin sem senza nie bez ei ikke не без")
_YES = _table("yes y true 1 ja oui si sí sim tak ano evet да 是 はい 예 네")
_NO = _table("no n false 0 nein non não nee nie ne nej hayır нет 否 いいえ 아니요")
