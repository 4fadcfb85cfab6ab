"""The words that titles, albums and artists are made of, each in Korean and in English.

Here: word lists and the forms that join them. Not here: which song gets which (`songs.py`).
A form takes its words by slot, so no title says one word twice. Earlier entries are drawn more often.
"""

from __future__ import annotations

from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Vocabulary:
    """slots: three lists of (Korean, English) words. forms: how they are joined, in both languages."""

    slots: tuple[Pairs, Pairs, Pairs]
    forms: Pairs


def _pairs(text: str) -> Pairs:
    """Pairs out of "사랑 Love, 밤 Night": the first blank divides Korean from English."""
    korean_english = (entry.strip().partition(" ") for entry in text.split(","))
    return tuple((korean, english) for korean, _, english in korean_english)


_SCENES = _pairs(
    "밤 Night, 비 Rain, 봄 Spring, 바다 Sea, 별 Star, 바람 Wind, 겨울 Winter, 달 Moon, 여름 Summer, "
    "하늘 Sky, 거리 Street, 새벽 Dawn, 꽃 Flower, 눈 Snow, 가을 Autumn, 강 River, 창가 Window, "
    "도시 City, 골목 Alley, 섬 Island, 숲 Forest, 구름 Cloud, 기차 Train, 오후 Afternoon, 서울 Seoul, "
    "파도 Wave, 노을 Sunset, 정류장 Bus Stop, 카페 Cafe, 언덕 Hill, 호수 Lake, 안개 Fog"
)
_FEELINGS = _pairs(
    "사랑 Love, 이별 Farewell, 추억 Memory, 기다림 Waiting, 눈물 Tears, 꿈 Dream, 약속 Promise, "
    "그리움 Longing, 고백 Confession, 편지 Letter, 노래 Song, 마음 Heart, 춤 Dance, 여행 Journey, "
    "비밀 Secret, 미소 Smile, 인사 Greeting, 첫사랑 First Love, 외로움 Loneliness, 행복 Happiness, "
    "후회 Regret, 이야기 Story, 청춘 Youth, 안녕 Goodbye, 위로 Comfort, 용기 Courage, 소원 Wish, "
    "기적 Miracle, 질투 Jealousy, 침묵 Silence, 설렘 Flutter, 상처 Scar"
)
_MODIFIERS = _pairs(
    "푸른 Blue, 하얀 White, 긴 Long, 마지막 Last, 작은 Little, 깊은 Deep, 따뜻한 Warm, "
    "잊혀진 Forgotten, 낯선 Strange, 조용한 Quiet, 빛나는 Shining, 차가운 Cold, 오래된 Old, "
    "먼 Distant, 붉은 Red, 달콤한 Sweet, 텅빈 Empty, 새로운 New, 느린 Slow, 투명한 Clear, "
    "혼자만의 Lonely, 끝없는 Endless, 어두운 Dark, 부드러운 Soft, 미친 Crazy, 검은 Black, "
    "비밀스러운 Hidden, 가벼운 Light, 황금빛 Golden, 부서진 Broken, 익숙한 Familiar, 영원한 Eternal"
)
_FAMILY_NAMES = _pairs(
    "김 Stone, 이 Lane, 박 Rivers, 최 Parker, 정 Bell, 강 Woods, 조 Hart, 윤 Fields, 장 Monroe, "
    "임 Gray, 한 Winters, 오 Blake, 서 Carter, 신 Hayes, 권 Ellis, 황 Ford"
)
_FIRST_SYLLABLES = _pairs(
    "민 Emma, 서 James, 지 Olivia, 하 Noah, 은 Ava, 준 Liam, 수 Mia, 현 Lucas, 유 Ella, 도 Henry, "
    "예 Grace, 태 Oscar, 나 Ruby, 승 Felix, 다 Alice, 재 Theo"
)
_LAST_SYLLABLES = _pairs(
    "준 Ray, 연 June, 우 Lee, 아 May, 호 Jay, 린 Rose, 혁 Max, 희 Faith, 빈 Cole, 영 Dawn, 석 Dean, "
    "경 Joy, 원 Kit, 훈 Rex, 미 Belle, 솔 Sol"
)

TITLES = Vocabulary(
    slots=(_SCENES, _FEELINGS, _MODIFIERS),
    forms=(
        ("{2} {0}의 {1}", "{1} in the {2} {0}"),
        ("{0}의 {1}", "{1} in the {0}"),
        ("{2} {0}, 그리고 {1}", "{2} {0} and {1}"),
        ("{2} {1}", "{2} {1}"),
        ("{2} {0}의 {1} (Live)", "{1} in the {2} {0} (Live)"),
        ("{2} {0}", "{2} {0}"),
        ("{0}, 그리고 {1}", "{0} and {1}"),
        ("{0}의 {1} (Remix)", "{1} in the {0} (Remix)"),
        ("{1}", "{1}"),
        ("{0}", "{0}"),
    ),
)
ARTISTS = Vocabulary(
    slots=(_FAMILY_NAMES, _FIRST_SYLLABLES, _LAST_SYLLABLES),
    forms=(("{0}{1}{2}", "{1} {2} {0}"), ("{0}{1}{2} 밴드", "{1} {2} {0} Band"), ("{1}{2}", "{1} {0}")),
)
ALBUMS = Vocabulary(
    slots=(_SCENES, _FEELINGS, _MODIFIERS),
    forms=(
        ("{2} {0}의 {1}", "{1} in the {2} {0}"),
        ("{0}의 {1}", "{1} in the {0}"),
        ("{2} {0} 그리고 {1} - EP", "{2} {0} and {1} - EP"),
        ("{2} {1} 모음집", "{2} {1} Collection"),
    ),
)
