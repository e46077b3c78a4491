CREATE TABLE IF NOT EXISTS conversations (
  id TEXT PRIMARY KEY,
  owner TEXT NOT NULL,
  title TEXT NOT NULL,
  created_at REAL NOT NULL,
  updated_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS conversations_of ON conversations (owner, updated_at);

CREATE TABLE IF NOT EXISTS turns (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
  text TEXT NOT NULL,
  current INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS turns_of ON turns (conversation);

CREATE TABLE IF NOT EXISTS images (
  sha256 TEXT PRIMARY KEY,
  media_type TEXT NOT NULL,
  width INTEGER NOT NULL,
  height INTEGER NOT NULL,
  data BLOB NOT NULL
);

CREATE TABLE IF NOT EXISTS turn_images (
  turn INTEGER NOT NULL REFERENCES turns (id) ON DELETE CASCADE,
  place INTEGER NOT NULL,
  sha256 TEXT NOT NULL REFERENCES images (sha256),
  name TEXT NOT NULL,
  PRIMARY KEY (turn, place)
);
CREATE INDEX IF NOT EXISTS turns_with ON turn_images (sha256);

CREATE TABLE IF NOT EXISTS answers (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  turn INTEGER NOT NULL REFERENCES turns (id) ON DELETE CASCADE,
  created_at REAL NOT NULL,
  settings TEXT NOT NULL,
  text TEXT NOT NULL DEFAULT '',
  token_ids TEXT NOT NULL DEFAULT '[]',
  status TEXT NOT NULL,
  kind TEXT,
  worker_id TEXT,
  request_id TEXT NOT NULL DEFAULT '',
  figures TEXT NOT NULL DEFAULT '{}',
  failure TEXT,
  vote TEXT,
  comment TEXT NOT NULL DEFAULT '',
  voted_at REAL
);
CREATE INDEX IF NOT EXISTS answers_of ON answers (turn);

CREATE TABLE IF NOT EXISTS votes (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  at REAL NOT NULL,
  owner TEXT NOT NULL,
  question TEXT NOT NULL,
  images TEXT NOT NULL,
  a TEXT NOT NULL,
  b TEXT NOT NULL,
  choice TEXT NOT NULL,
  blind INTEGER NOT NULL
);
