"""Changes of a job's state, each in one atomic step inside Redis.

A process may die between any two commands, so whatever must happen together is one Lua script. The keys are RQ's
own, so its tools and its worker code keep working; ours are `claims` (worker -> job it has taken but not begun)
and the fields `tasks`, `kills`, `cancel` and `reason` of a job.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from redis import Redis
from rq.defaults import RQ_KEY_PREFIX

CLAIMS = f"{RQ_KEY_PREFIX}:anomaly:claims"

_COMMON = f"""
local rq = '{RQ_KEY_PREFIX}:'
local claims = '{CLAIMS}'

local function now()
    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function queue_of(name) return rq .. 'queue:' .. name end
local function taken_of(name) return rq .. 'queue:' .. name .. ':intermediate' end
local function job_of(id) return rq .. 'job:' .. id end

-- Standing in line, or due for another try.
local function waiting(id, queue)
    return redis.call('LPOS', queue_of(queue), id) or redis.call('ZSCORE', rq .. 'scheduled:' .. queue, id)
end

-- Taken by a worker; its executions expire with the worker's heartbeat.
local function running(id, queue)
    return redis.call('LPOS', taken_of(queue), id) or redis.call('EXISTS', rq .. 'executions:' .. id) == 1
end

local function push(id, queue, front)
    redis.call('HSET', job_of(id), 'status', 'queued', 'origin', queue, 'worker_name', '', 'started_at', '')
    redis.call(front and 'LPUSH' or 'RPUSH', queue_of(queue), id)
end

-- End a job in RQ's registry of failures, where it stays for a bounded time.
local function close(id, queue, status, reason)
    local key = job_of(id)
    local seconds = tonumber(redis.call('HGET', key, 'failure_ttl')) or 604800
    redis.call('HSET', key, 'status', status, 'reason', reason, 'worker_name', '')
    redis.call('EXPIRE', key, seconds)
    redis.call('ZADD', rq .. 'failed:' .. queue, math.floor(now()) + seconds, id)
end

local function forget(id)
    local queue = redis.call('HGET', job_of(id), 'origin')
    if queue then
        for _, registry in ipairs({{'finished:', 'failed:', 'canceled:', 'scheduled:'}}) do
            redis.call('ZREM', rq .. registry .. queue, id)
        end
    end
    redis.call('DEL', job_of(id), rq .. 'results:' .. id, rq .. 'executions:' .. id)
end

local function save(id, queue, first)
    forget(id)
    redis.call('HSET', job_of(id), unpack(ARGV, first))
    redis.call('SADD', rq .. 'queues', queue_of(queue))
    push(id, queue, false)
end

-- What becomes of a job whose worker is dead. `most` is how many workers it may cost; 0 does not count this one.
local function after_death(id, queue, most, reason)
    if redis.call('HGET', job_of(id), 'cancel') then
        close(id, queue, 'stopped', 'Cancelled.')
        return 'stopped'
    end
    if most > 0 and redis.call('HINCRBY', job_of(id), 'kills', 1) >= most then
        close(id, queue, 'failed', reason)
        return 'failed'
    end
    push(id, queue, true)
    return 'queued'
end

-- Of jobs that run one after the other: a project's fits, its looks at the annotations, its moves of the threshold.
local function prefix_of(id)
    return string.match(id, '^fit%-%d+%-') or string.match(id, '^feedback%-%d+%-')
        or string.match(id, '^threshold%-%d+%-') or string.match(id, '^rank%-%d+%-')
end
-- What must not run at the same time: looks and moves both write what a version says.
local function rivals_of(id)
    local project = string.match(id, '^feedback%-(%d+)%-') or string.match(id, '^threshold%-(%d+)%-')
    if project then return {{'feedback-' .. project .. '-', 'threshold-' .. project .. '-'}} end
    return {{prefix_of(id)}}
end
local function begins(id, prefix) return string.sub(id, 1, #prefix) == prefix end
local function any_begins(ids, prefix)
    for _, id in ipairs(ids) do
        if begins(id, prefix) then return id end
    end
    return nil
end
"""

# ARGV: id, queue, urgent ('1' or ''), then the job's fields. Returns 1 if the job is new, 0 if it is under way.
_ADD = """
local id, queue, urgent = ARGV[1], ARGV[2], ARGV[3] == '1'
local origin = redis.call('HGET', job_of(id), 'origin')
if origin and running(id, origin) then return 0 end
if origin and waiting(id, origin) then
    if urgent and origin ~= queue then
        redis.call('LREM', queue_of(origin), 1, id)
        redis.call('ZREM', rq .. 'scheduled:' .. origin, id)
        push(id, queue, false)
    end
    return 0
end
save(id, queue, 4)
return 1
"""

# ARGV: id, queue, then the job's fields. Returns the id of the job that will run: this one, or one of its kind and
# project that waits already.
_ADD_NEXT = """
local id, queue = ARGV[1], ARGV[2]
local prefix = prefix_of(id)
local stands = any_begins(redis.call('LRANGE', queue_of(queue), 0, -1), prefix)
    or any_begins(redis.call('ZRANGE', rq .. 'scheduled:' .. queue, 0, -1), prefix)
if stands then return stands end
if redis.call('EXISTS', job_of(id)) == 1 and running(id, queue) then id = id .. '-again' end
save(id, queue, 3)
return id
"""

# ARGV: worker, then the queues in order of priority. Returns {queue, id} or nothing. Asked again before the job has
# begun it gives the same job, so an answer lost with its connection loses no job.
_CLAIM = """
local worker = ARGV[1]
local held = redis.call('HGET', claims, worker)
if held then return {string.match(held, '^([^:]*):(.*)$')} end

local function promote(queue)
    local due = redis.call('ZRANGEBYSCORE', rq .. 'scheduled:' .. queue, '-inf', now(), 'LIMIT', 0, 100)
    for _, id in ipairs(due) do
        redis.call('ZREM', rq .. 'scheduled:' .. queue, id)
        if redis.call('HGET', job_of(id), 'cancel') then
            close(id, queue, 'stopped', 'Cancelled.')
        elseif redis.call('EXISTS', job_of(id)) == 1 then
            push(id, queue, true)
        end
    end
end

local function free(id, queue)
    for _, prefix in ipairs(rivals_of(id)) do
        if any_begins(redis.call('LRANGE', taken_of(queue), 0, -1), prefix)
            or any_begins(redis.call('ZRANGE', rq .. 'wip:' .. queue, 0, -1), prefix) then return false end
    end
    return true
end

for index = 2, #ARGV do
    local queue = ARGV[index]
    promote(queue)
    local skipped = 0
    while true do
        local id = redis.call('LINDEX', queue_of(queue), skipped)
        if not id then break end
        if free(id, queue) then
            redis.call('LREM', queue_of(queue), 1, id)
            redis.call('RPUSH', taken_of(queue), id)
            redis.call('HSET', claims, worker, queue .. ':' .. id)
            return {queue, id}
        end
        skipped = skipped + 1
    end
end
return nil
"""

# ARGV: worker, most kills, reason if the job ends. For the job that a dead worker took and did not begin.
# Returns 'queued', 'failed', 'stopped' or '' (there was none).
_UNCLAIM = """
local held = redis.call('HGET', claims, ARGV[1])
if not held then return '' end
redis.call('HDEL', claims, ARGV[1])
local queue, id = string.match(held, '^([^:]*):(.*)$')
if redis.call('LREM', taken_of(queue), 1, id) == 0 then return '' end
if redis.call('EXISTS', job_of(id)) == 0 or waiting(id, queue) then return '' end
return after_death(id, queue, tonumber(ARGV[2]), ARGV[3])
"""

# ARGV: queue, id, execution, most kills, reason if the job ends. For a job that a dead worker was running.
# Returns 'queued', 'failed', 'stopped' or '' (somebody else was first).
_GIVE_BACK = """
local queue, id, execution = ARGV[1], ARGV[2], ARGV[3]
local entry = id .. ':' .. execution
if redis.call('ZREM', rq .. 'wip:' .. queue, entry) == 0 then return '' end
redis.call('DEL', rq .. 'execution:' .. entry)
redis.call('ZREM', rq .. 'executions:' .. id, execution)
redis.call('LREM', taken_of(queue), 0, id)
local status = redis.call('HGET', job_of(id), 'status')
if not status or status == 'finished' or status == 'failed' or status == 'stopped' or status == 'canceled' then
    return ''
end
if waiting(id, queue) or redis.call('EXISTS', rq .. 'executions:' .. id) == 1 then return '' end
return after_death(id, queue, tonumber(ARGV[4]), ARGV[5])
"""

# ARGV: id, time. Returns 'removed', the name of the worker to tell ('' while it is being taken), or nothing.
_CANCEL = """
local id = ARGV[1]
local queue = redis.call('HGET', job_of(id), 'origin')
if not queue then return nil end
local line = redis.call('LREM', queue_of(queue), 0, id) + redis.call('ZREM', rq .. 'scheduled:' .. queue, id)
if line > 0 then
    close(id, queue, 'stopped', 'Cancelled before it ran.')
    return 'removed'
end
if not running(id, queue) then return nil end
redis.call('HSET', job_of(id), 'cancel', ARGV[2])
return redis.call('HGET', job_of(id), 'worker_name') or ''
"""

# ARGV: id, meta. Writes the progress unless the job is gone; returns 1 if the job shall stop.
_PROGRESS = """
local key = job_of(ARGV[1])
if redis.call('EXISTS', key) == 0 then return 1 end
redis.call('HSET', key, 'meta', ARGV[2])
return redis.call('HEXISTS', key, 'cancel')
"""


class Scripts:
    """The scripts, registered on one connection; each can also be queued on a pipeline."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection

    @cached_property
    def add(self) -> Callable[..., Any]:
        return self._register(_ADD)

    @cached_property
    def add_next(self) -> Callable[..., Any]:
        return self._register(_ADD_NEXT)

    @cached_property
    def claim(self) -> Callable[..., Any]:
        return self._register(_CLAIM)

    @cached_property
    def unclaim(self) -> Callable[..., Any]:
        return self._register(_UNCLAIM)

    @cached_property
    def give_back(self) -> Callable[..., Any]:
        return self._register(_GIVE_BACK)

    @cached_property
    def cancel(self) -> Callable[..., Any]:
        return self._register(_CANCEL)

    @cached_property
    def progress(self) -> Callable[..., Any]:
        return self._register(_PROGRESS)

    def _register(self, source: str) -> Callable[..., Any]:
        return self._connection.register_script(_COMMON + source)


def text(value: bytes | str | None) -> str:
    """Return Redis' answer as text, nothing as ""."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
