"""Downloads from a local server that breaks, changes its mind, and lies."""

import hashlib
import http.server
import re
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

from overlock.checkpoint import CheckpointError, download, find_file, load, registry

# As a zip archive begins.
CONTENT = b'PK\x03\x04' + bytes(range(252)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under every name.

    Attributes:
        breaks: After how many bytes of the body each of the next answers breaks off.
        requests: (path, Range) of each request.
        ranges: Whether parts are served.
        tag: ETag of the content; None for none.
        length: Whether the length is told.
    """

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.content, self.breaks, self.requests, self.ranges, self.tag = CONTENT, [], [], True, '"1"'
        self.length = True

    def url(self, name='w.pth'):
        return f'http://127.0.0.1:{self.server_port}/v1/{name}'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get('Range')
        server.requests.append((self.path, asked))
        if self.path.endswith('absent.pth'):
            return self.send_error(404)
        start = int(re.fullmatch(r'bytes=(\d+)-', asked)[1]) if asked else 0
        if not server.ranges or server.tag is None or self.headers.get('If-Range') != server.tag:
            start = 0
        if start >= len(server.content):
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if server.length:
            self.send_header('Content-Length', str(len(body)))
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(server.content) - 1}/{len(server.content)}')
        if server.tag is not None:
            self.send_header('ETag', server.tag)
        self.end_headers()
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, with torch hub's cache in `tmp_path / 'hub'` and no folder of weights."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.delenv('OVERLOCK_WEIGHTS', raising=False)
    monkeypatch.setenv('OVERLOCK_ALLOW_HTTP', '1')
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def files(folder):
    return sorted(path.name for path in folder.rglob('*') if path.is_file() and path.suffix not in ('.lock', '.sha256'))


def test_download_shows_progress_and_happens_once(server, tmp_path, capfd):
    path = find_file(server.url())
    assert path == tmp_path / 'hub' / 'checkpoints' / 'w.pth' and path.read_bytes() == CONTENT
    assert re.search(r'w\.pth: .*100%.*M/', capfd.readouterr().err)
    assert find_file(server.url()) == path and len(server.requests) == 1
    assert files(tmp_path) == ['w.pth']


def test_broken_connection_is_continued_at_once(server, tmp_path):
    server.breaks = [300_000, 500_000]
    assert find_file(server.url()).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, 'bytes=300000-', 'bytes=800000-']
    assert files(tmp_path) == ['w.pth']


def test_download_that_gave_up_is_continued_by_the_next(server, tmp_path):
    server.breaks = [300_000, 0]
    with pytest.raises(CheckpointError, match='broke after 300000 bytes.*; try again, or fetch w.pth by other means'):
        find_file(server.url())
    assert files(tmp_path) == ['w.pth.part', 'w.pth.part.version']
    assert find_file(server.url()).read_bytes() == CONTENT
    assert server.requests[-1][1] == 'bytes=300000-' and files(tmp_path) == ['w.pth']


@pytest.mark.parametrize(
    'change',
    [
        dict(content=CONTENT[:100] + CONTENT[::-1], tag='"2"'),
        dict(content=CONTENT[:1000], tag='"2"'),
        dict(ranges=False),
        dict(tag=None),
    ],
    ids=['another file', 'a shorter file', 'no ranges', 'no version'],
)
def test_part_of_another_file_is_not_continued(server, change, tmp_path):
    server.breaks = [300_000, 0]
    with pytest.raises(CheckpointError):
        find_file(server.url())
    for name, value in change.items():
        setattr(server, name, value)
    assert find_file(server.url()).read_bytes() == server.content
    assert files(tmp_path) == ['w.pth']


def test_part_longer_than_the_file_is_started_again(server, tmp_path):
    part = tmp_path / 'hub' / 'checkpoints' / 'w.pth.part'
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT * 2)
    part.with_name('w.pth.part.version').write_text('"1"')
    assert find_file(server.url()).read_bytes() == CONTENT


def test_server_that_never_gets_further_ends_in_an_error(server):
    server.tag, server.breaks = None, [1000] * 50
    with pytest.raises(CheckpointError, match='broke after 1000 bytes, and again'):
        find_file(server.url())
    assert len(server.requests) == 2


def test_missing_file_is_an_error_that_names_the_folder(server, tmp_path):
    with pytest.raises(
        CheckpointError, match='cannot download .*absent.pth .HTTP Error 404: .*OVERLOCK_WEIGHTS names'
    ) as caught:
        find_file(server.url('absent.pth'))
    assert files(tmp_path) == []
    # Without the calls inside urllib.
    assert 'urllib' not in ''.join(traceback.format_exception(caught.value))
    assert isinstance(caught.value.__context__, HTTPError)


def test_server_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    monkeypatch.delenv('OVERLOCK_WEIGHTS', raising=False)
    monkeypatch.setenv('OVERLOCK_ALLOW_HTTP', '1')
    # Nothing listens on the discard port.
    with pytest.raises(CheckpointError, match='cannot download .*w.pth.* OVERLOCK_WEIGHTS names, or at .*w.pth'):
        find_file('http://127.0.0.1:9/w.pth')
    assert files(tmp_path) == []


def test_file_that_is_not_the_published_one_is_not_kept(server, tmp_path, monkeypatch):
    weights = registry.Weights(server.url(), 'xt', 'classification', {}, sha256='0' * 64)
    monkeypatch.setitem(registry.WEIGHTS, 'ours', weights)
    for source in ('ours', server.url()):
        with pytest.raises(
            CheckpointError, match=f'w.pth is not the published one: expected SHA-256 {"0" * 64}, got {SHA256}; fetch'
        ):
            find_file(source)
    assert files(tmp_path) == []


def test_answers_that_are_no_weight_file_are_not_kept(server, tmp_path):
    server.content = b'<html>log in first</html>'
    with pytest.raises(CheckpointError, match='the file from .*w.pth is no weight file: expected one of torch.save'):
        find_file(server.url())
    assert files(tmp_path) == []


def test_answer_of_unknown_length_is_refused(server):
    server.length = False
    with pytest.raises(CheckpointError, match='the server does not tell the length of the file'):
        find_file(server.url())


@pytest.mark.parametrize('url', ['http://127.0.0.1:1/a b.pth', 'http://host:abc/x.pth', 'http://[/x.pth'])
def test_address_that_is_none_is_an_error(server, url):
    with pytest.raises(CheckpointError, match='cannot download'):
        find_file(url)


def test_known_hash_is_accepted(server, tmp_path):
    download.download(server.url(), tmp_path / 'a.pth', SHA256)
    assert (tmp_path / 'a.pth').read_bytes() == CONTENT


def test_hash_in_the_name_counts(server, tmp_path):
    assert find_file(server.url(f'good-{SHA256[:8]}.pth')).read_bytes() == CONTENT
    with pytest.raises(CheckpointError, match='expected SHA-256 0123456f, got'):
        find_file(server.url('bad-0123456f.pth'))
    assert find_file(server.url('date-20250131.pth')).read_bytes() == CONTENT
    assert files(tmp_path) == ['date-20250131.pth', f'good-{SHA256[:8]}.pth']


def test_processes_that_want_the_same_file_fetch_it_once(server):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(find_file, [server.url()] * 8))
    assert len(set(paths)) == 1 and len(server.requests) == 1
    assert paths[0].read_bytes() == CONTENT


def test_folder_of_weights_is_looked_into_first(server, tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path))
    (tmp_path / 'w.pth').write_bytes(b'x')
    assert find_file(server.url()) == tmp_path / 'w.pth'
    assert find_file(server.url('other.pth')).read_bytes() == CONTENT


def test_folder_that_is_not_there_is_an_error(server, tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path / 'absent'))
    with pytest.raises(CheckpointError, match='OVERLOCK_WEIGHTS must name a folder .*, got .*absent, which is neither'):
        find_file(server.url())
    assert not server.requests


def test_weights_of_a_name_come_from_the_mirror(server, tmp_path, monkeypatch):
    torch.save({'a.weight': torch.ones(1)}, tmp_path / 'content')
    server.content = (tmp_path / 'content').read_bytes()
    monkeypatch.setenv('OVERLOCK_WEIGHTS', server.url('').rstrip('/'))
    assert load('overlock_s_in1k') == {'a.weight': torch.ones(1)}
    assert [path for path, _ in server.requests] == ['/v1/overlock_s_in1k_224.pth']
    with pytest.raises(CheckpointError, match='cannot download http://127.0.0.1:9/own.pth'):
        find_file('http://127.0.0.1:9/own.pth')
    assert (tmp_path / 'hub' / 'checkpoints' / 'overlock_s_in1k_224.pth').is_file()


def test_folder_instead_of_a_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match='is a folder, expected a weight file; give the path of a file in it'):
        find_file(tmp_path)


def test_path_that_is_nowhere_is_an_error_that_knows_similar_names():
    with pytest.raises(CheckpointError, match='The weight file nowhere.pth does not exist; give'):
        find_file('nowhere.pth')
    with pytest.raises(CheckpointError, match='such as .*overlock_s_in1k'):
        find_file('overlock_s_ink')


def test_file_that_changed_after_its_download_is_refused(server):
    path = find_file(server.url())
    assert path.with_name('w.pth.sha256').read_text() == f'{SHA256}  w.pth\n'
    content = bytearray(CONTENT)
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f'w.pth is not the file that was downloaded: expected SHA-256 {SHA256}'):
        find_file(server.url())
    path.unlink()
    assert find_file(server.url()).read_bytes() == CONTENT


def test_file_that_was_put_there_by_hand_is_taken_as_it_is(server, tmp_path):
    path = tmp_path / 'hub' / 'checkpoints' / 'w.pth'
    path.parent.mkdir(parents=True)
    path.write_bytes(b'mine')
    assert find_file(server.url()).read_bytes() == b'mine' and not server.requests


def test_unencrypted_address_needs_a_hash_or_consent(server, monkeypatch):
    monkeypatch.delenv('OVERLOCK_ALLOW_HTTP')
    reason = 'is not encrypted and has no known SHA-256, .*; give .* or set OVERLOCK_ALLOW_HTTP=1'
    for name in ('w.pth', f'short-{SHA256[:8]}.pth'):
        with pytest.raises(CheckpointError, match=f'{name} {reason}'):
            find_file(server.url(name))
    assert not server.requests
    assert find_file(server.url(f'known-{SHA256}.pth')).read_bytes() == CONTENT


def test_server_that_sends_on_to_an_unencrypted_address_is_refused(server, monkeypatch):
    monkeypatch.setattr(download, 'urlopen', lambda request, timeout: urlopen(server.url()))
    with pytest.raises(CheckpointError, match='sends on to http://127.0.0.1.*, which is not encrypted'):
        find_file('https://host.invalid/w.pth')
