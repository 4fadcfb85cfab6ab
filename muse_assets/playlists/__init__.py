"""From a program's songs to the FAISS ids that the search server reads out of Redis.

`songs` (playlist database) -> `ids` (embedding tables) -> `cache` (Redis), composed in `refreshing`. Not
here: connecting to any of them (`connections`), or when a refresh happens (`assets`).
"""
