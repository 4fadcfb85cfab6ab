-- Three users, each with what it needs and no more. MySQL 8 and MariaDB.
--
-- Fill in a copy that nobody else can read, run it as an administrator, and delete the copy:
--   @MUSE_HOST@            the address that the builds come from
--   @..._PASSWORD@         one password each; the same in /etc/muse/*.env
-- Where the three databases are on three servers, each server gets its own section.
-- Names are those of the catalog; an installation that overrides them (MUSE_CATALOG) changes them here.

-- 1. The embedding tables: the columns that a build and a playlist read. Of a table without created_at
--    leave that column out. Grants of columns alone are enough: nothing asks for SHOW CREATE TABLE.
CREATE USER IF NOT EXISTS 'muse_embeddings'@'@MUSE_HOST@' IDENTIFIED BY '@EMBEDDING_PASSWORD@';
GRANT SELECT (idx, embedding_result, disccommseq, trackno, created_at)
  ON muse.tb_embedding_clap_h TO 'muse_embeddings'@'@MUSE_HOST@';
GRANT SELECT (idx, embedding_result, disccommseq, trackno, created_at)
  ON muse.tb_embedding_clap_lyrics_summary_h TO 'muse_embeddings'@'@MUSE_HOST@';
GRANT SELECT (idx, artist_embedding, disccommseq, trackno, created_at)
  ON muse.tb_embedding_bgem3_artist_h TO 'muse_embeddings'@'@MUSE_HOST@';
GRANT SELECT (idx, song_name_embedding, disccommseq, trackno, created_at)
  ON muse.tb_embedding_bgem3_song_name_h TO 'muse_embeddings'@'@MUSE_HOST@';
GRANT SELECT (idx, album_name_embedding, disccommseq, created_at)
  ON muse.tb_embedding_bgem3_album_name_h TO 'muse_embeddings'@'@MUSE_HOST@';
GRANT SELECT (idx, embedding_result, disccommseq, trackno, created_at)
  ON muse.tb_embedding_bgem3_lyrics_slide_h TO 'muse_embeddings'@'@MUSE_HOST@';
GRANT SELECT (idx, embedding_result, disccommseq, trackno, created_at)
  ON muse.tb_embedding_bgem3_lyrics_3_slide_h TO 'muse_embeddings'@'@MUSE_HOST@';

-- 2. The program tables, whole: `muse search` asks which columns they have, and a grant of columns refuses
--    that. For MUSE_PLAYLIST_LAYOUT=song_pool: tb_playlist_song_pool_m and tb_program_m instead.
CREATE USER IF NOT EXISTS 'muse_playlists'@'@MUSE_HOST@' IDENTIFIED BY '@PLAYLIST_PASSWORD@';
GRANT SELECT ON muse.tb_song_drp_m TO 'muse_playlists'@'@MUSE_HOST@';
GRANT SELECT ON muse.tb_song_fgy_m TO 'muse_playlists'@'@MUSE_HOST@';
GRANT SELECT ON muse.tb_song_k2k_m TO 'muse_playlists'@'@MUSE_HOST@';
GRANT SELECT ON muse.tb_song_mdi_m TO 'muse_playlists'@'@MUSE_HOST@';
GRANT SELECT ON muse.tb_song_nmg_m TO 'muse_playlists'@'@MUSE_HOST@';
GRANT SELECT ON muse.tb_song_rtc_m TO 'muse_playlists'@'@MUSE_HOST@';

-- 3. The Dagster instance: a schema of its own, which Dagster fills and migrates itself.
CREATE DATABASE IF NOT EXISTS muse_dagster CHARACTER SET utf8mb4;
CREATE USER IF NOT EXISTS 'muse_dagster'@'@MUSE_HOST@' IDENTIFIED BY '@INSTANCE_PASSWORD@';
GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, DROP, INDEX, REFERENCES
  ON muse_dagster.* TO 'muse_dagster'@'@MUSE_HOST@';
