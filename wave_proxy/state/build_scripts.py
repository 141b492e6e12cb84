"""The changes that a build goes through, each one Lua script, so that nobody ever sees half of one.

All scripts begin with what they share. The only declared key of each is the stream: others are named after what it
holds, and the hash tag keeps them all on the stream's node. The time is Redis' own.
"""

KEYS_PREFIX = "wave:{builds}:"
STREAM = f"{KEYS_PREFIX}ready"
CHANGES = f"{KEYS_PREFIX}changes"  # a channel: the ids of builds whose phase has changed
MAX_ATTEMPTS = 3

_SHARED = """
local PREFIX, STREAM, GROUP, MAX_ATTEMPTS = '@PREFIX', KEYS[1], 'builders', @MAX_ATTEMPTS
local TURNS, SERVED, RUNNING, TOTALS = PREFIX .. 'turns', PREFIX .. 'served', PREFIX .. 'running', PREFIX .. 'totals'
local ALL = 1000000

local function key(kind, name)
  return PREFIX .. kind .. ':' .. name
end

local function announce(id)
  redis.call('PUBLISH', PREFIX .. 'changes', id)
end

local function exact(number)
  return string.format('%.17g', number)
end

local function now()
  local time = redis.call('TIME')
  return string.format('%d.%06d', time[1], time[2])
end

-- The group is made together with the stream, and again if somebody has destroyed it: then all that is in the stream
-- is delivered anew.
local function ensure_group()
  if redis.call('EXISTS', STREAM) == 0 or #redis.call('XINFO', 'GROUPS', STREAM) == 0 then
    redis.call('XGROUP', 'CREATE', STREAM, GROUP, '0', 'MKSTREAM')
  end
end

local function count_claimed()
  return redis.call('XPENDING', STREAM, GROUP)[1]
end

-- Gives an owner who has builds waiting, and may have another one running, his turn: where his last turn has put him,
-- but not before those who have their turn now, so that nobody saves up turns. Who comes later stands a little behind:
-- so those who come at the same time have their turns in this order, and ever new owners don't starve an old one.
local function join(owner, most)
  if redis.call('LLEN', key('waiting', owner)) == 0 or redis.call('ZSCORE', TURNS, owner)
      or tonumber(redis.call('HGET', RUNNING, owner) or 0) >= most then
    return
  end
  local tag = tonumber(redis.call('ZSCORE', SERVED, owner) or 0)
  local turn = tonumber(redis.call('HGET', TOTALS, 'turn') or 0)
  if tag <= turn then
    tag = turn + 1 / 256
    redis.call('HSET', TOTALS, 'turn', exact(tag))
  end
  redis.call('ZADD', TURNS, exact(tag), owner)
end

-- Puts the build whose turn it is into the stream, if it may run now. One at a time stands there without a builder: the
-- turns of the others are still open.
local function promote(limit, most)
  ensure_group()
  local slots = redis.call('XLEN', STREAM)
  if slots >= limit or slots > count_claimed() then
    return
  end
  local first = redis.call('ZRANGE', TURNS, 0, 0, 'WITHSCORES')
  while #first > 0 and tonumber(redis.call('HGET', RUNNING, first[1]) or 0) >= most do
    redis.call('ZREM', TURNS, first[1])
    first = redis.call('ZRANGE', TURNS, 0, 0, 'WITHSCORES')
  end
  if #first == 0 then
    return
  end
  local owner, tag = first[1], tonumber(first[2])
  local turn = math.max(tag, tonumber(redis.call('HGET', TOTALS, 'turn') or 0))
  redis.call('HSET', TOTALS, 'turn', exact(turn))
  redis.call('ZREMRANGEBYSCORE', SERVED, '-inf', exact(turn))
  redis.call('ZADD', SERVED, exact(tag + 1), owner)
  redis.call('ZREM', TURNS, owner)
  redis.call('HINCRBY', RUNNING, owner, 1)
  redis.call('HINCRBY', TOTALS, 'waiting', -1)
  local id = redis.call('LPOP', key('waiting', owner))
  local entry = redis.call('XADD', STREAM, '*', 'build', id)
  redis.call('HSET', key('build', id), 'entry', entry)
  join(owner, most)
end

-- A consumer is there for as long as it has builds.
local function leave(consumer)
  if #redis.call('XPENDING', STREAM, GROUP, '-', '+', 1, consumer) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', STREAM, GROUP, consumer)
  end
end

-- Puts a build in line, behind the others of its owner.
local function enqueue(id, owner, limit, most)
  redis.call('RPUSH', key('waiting', owner), id)
  redis.call('HINCRBY', TOTALS, 'waiting', 1)
  join(owner, most)
  promote(limit, most)
end

-- Frees a build's slot, or its place in line, if it has one.
local function free(id, limit, most)
  local owner, entry, builder, after = unpack(
    redis.call('HMGET', key('build', id), 'owner', 'entry', 'builder', 'after'))
  ensure_group()
  if entry then
    redis.call('XACK', STREAM, GROUP, entry)
    redis.call('XDEL', STREAM, entry)
    if redis.call('HINCRBY', RUNNING, owner, -1) <= 0 then
      redis.call('HDEL', RUNNING, owner)
    end
    if builder then
      leave(builder)
    end
  elseif after then
    redis.call('LREM', key('followers', after), 1, id)
  else
    redis.call('LREM', key('waiting', owner), 1, id)
    redis.call('HINCRBY', TOTALS, 'waiting', -1)
    if redis.call('LLEN', key('waiting', owner)) == 0 then
      redis.call('ZREM', TURNS, owner)
    end
  end
  join(owner, most)
  promote(limit, most)
end

-- Records the end of a build; from now on all that is known of it runs out. What was to come after it gets in line now,
-- or ends as well when the build has failed.
local finish
finish = function(id, exit_status, digest, reason, retention, limit, most)
  local build = key('build', id)
  redis.call('HSET', build, 'phase', 'done', 'finished', now(), 'exit_status', exit_status, 'digest', digest,
    'reason', reason)
  announce(id)
  redis.call('HDEL', build, 'entry', 'appended')
  redis.call('DEL', key('spec', id), key('log', id))
  redis.call('EXPIRE', build, retention)
  local container, target = unpack(redis.call('HMGET', build, 'container', 'target'))
  redis.call('EXPIRE', key('count', container), retention)
  if redis.call('GET', key('target', target)) == id then
    redis.call('EXPIRE', key('target', target), retention)
  end
  local followers = redis.call('LRANGE', key('followers', id), 0, -1)
  redis.call('DEL', key('followers', id))
  for _, follower in ipairs(followers) do
    redis.call('HDEL', key('build', follower), 'after')
    if tonumber(exit_status) == 0 then
      redis.call('HSET', key('build', follower), 'created', now())
      enqueue(follower, redis.call('HGET', key('build', follower), 'owner'), limit, most)
    else
      finish(follower, exit_status, '', 'there is no image: ' .. id .. ' failed', retention, limit, most)
    end
  end
end

-- The build of a target that a new request for it is to get, if there is one.
local function find_usable(target, gone, failure_memory)
  local id = redis.call('GET', key('target', target))
  if not id then
    return nil
  end
  local phase, exit_status, finished = unpack(
    redis.call('HMGET', key('build', id), 'phase', 'exit_status', 'finished'))
  if phase == 'done' and exit_status == '0' and id == gone then
    return nil
  elseif phase == 'done' and exit_status ~= '0' and tonumber(finished) + failure_memory <= tonumber(now()) then
    return nil
  end
  return phase and id
end
"""


def _script(text: str) -> str:
    shared = _SHARED.replace("@PREFIX", KEYS_PREFIX).replace("@MAX_ATTEMPTS", str(MAX_ATTEMPTS))
    return shared + text


# Reserves a target for the one who is to be admitted. The reservation keeps others from being admitted for the same;
# that there is one build alone SUBMIT sees to.
# Keys: stream. Arguments: target image; id of the submission; how long it is reserved (ms); id of a build whose image
# is gone, or empty; for how long failures are remembered (s).
# Result: the id of the build that is there; 'reserved'; 'wait', as somebody else has reserved it.
RESERVE = _script("""
local target, submission, lease, gone, failure_memory = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local id = find_usable(target, gone, failure_memory)
if id then
  return id
end
local reservation = key('reserved', target)
if redis.call('SET', reservation, submission, 'PX', lease, 'NX') or redis.call('GET', reservation) == submission then
  return 'reserved'
end
return 'wait'
""")

# Holds a reservation for longer, or gives it back.
# Keys: stream. Arguments: target image; id of the submission; for how long from now (ms), 0 to give it back.
# Result: 1; 0 when somebody else or nobody has reserved the target.
HOLD = _script("""
local reservation = key('reserved', ARGV[1])
if redis.call('GET', reservation) ~= ARGV[2] then
  return 0
end
return redis.call('PEXPIRE', reservation, ARGV[3])
""")

# Records a new build, unless there is one by now, and gives back the reservation.
# Keys: stream. Arguments: target image; id of the submission; id of a build whose image is gone, or empty; for how long
# failures are remembered (s); series; owner; spec as it is looked up; spec as it is built; limits; id of the build that
# it is to come after, or empty.
# Result: id of the build; 1 if it is this submission's (the script may be repeated), else 0.
SUBMIT = _script("""
local target, submission, gone, failure_memory = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local container, owner, limit, most, after = ARGV[5], ARGV[6], tonumber(ARGV[9]), tonumber(ARGV[10]), ARGV[11]
if redis.call('GET', key('reserved', target)) == submission then
  redis.call('DEL', key('reserved', target))
end
local id = redis.call('GET', key('target', target))
if id and redis.call('HGET', key('build', id), 'submission') == submission then
  return {id, 1}
end
id = find_usable(target, gone, failure_memory)
if id then
  return {id, 0}
end
repeat
  id = container .. '_' .. redis.call('INCR', key('count', container))
until redis.call('EXISTS', key('build', id)) == 0
redis.call('PERSIST', key('count', container))
redis.call('SET', key('target', target), id)
redis.call('HSET', key('build', id), 'phase', 'queued', 'created', now(), 'spec', ARGV[7], 'owner', owner,
  'container', container, 'target', target, 'submission', submission)
redis.call('SET', key('spec', id), ARGV[8])
local phase = after ~= '' and redis.call('HGET', key('build', after), 'phase')
if phase and phase ~= 'done' then
  redis.call('HSET', key('build', id), 'after', after)
  redis.call('RPUSH', key('followers', after), id)
else
  enqueue(id, owner, limit, most)
end
return {id, 1}
""")

# Claims a build: one whose builder has let its lease run out, else the next one.
# Keys: stream. Arguments: builder; secret of the claim; lease (ms); limits.
# Result: id; verdict ('build', 'dead' after too many builders, or 'cancelled'); spec as it is built; the record's
# fields and values. When there is nothing to claim: the stream's last id; in how many ms the next lease may run out,
# -1 if there is none.
CLAIM = _script("""
local builder, secret, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local limit, most = tonumber(ARGV[4]), tonumber(ARGV[5])

local function build_of(entry)
  return redis.call('XRANGE', STREAM, entry, entry)[1][2][2]
end

local function answer(id)
  local build = key('build', id)
  return {id, redis.call('HGET', build, 'verdict'), redis.call('GET', key('spec', id)), redis.call('HGETALL', build)}
end

local function take(id)
  local build, log = key('build', id), key('log', id)
  local attempt = tonumber(redis.call('HGET', build, 'attempt') or 0)
  local is_lost = redis.call('HEXISTS', build, 'claim') == 1 and redis.call('HGET', build, 'claim') ~= 'released'
  local verdict = attempt < MAX_ATTEMPTS and 'build' or 'dead'
  verdict = redis.call('HEXISTS', build, 'cancelled') == 1 and 'cancelled' or verdict
  redis.call('HSET', build, 'claim', secret, 'builder', builder, 'verdict', verdict)
  promote(limit, most)
  if verdict ~= 'build' then
    return answer(id)
  end
  redis.call('HSET', build, 'phase', 'running', 'started', now(), 'attempt', attempt + 1)
  announce(id)
  if is_lost then
    local last = redis.call('GETRANGE', log, -1, -1)
    redis.call('APPEND', log, (last == '' or last == '\\n') and '' or '\\n')
    redis.call('APPEND', log, string.format('>> The builder died. Attempt %d of %d begins here.\\n', attempt + 1,
      MAX_ATTEMPTS))
  end
  return answer(id)
end

promote(limit, most)
for _, pending in ipairs(redis.call('XPENDING', STREAM, GROUP, '-', '+', ALL, builder)) do
  local id = build_of(pending[1])
  if redis.call('HGET', key('build', id), 'claim') == secret then
    return answer(id)  -- once more: the answer was lost
  end
end
local expired = redis.call('XPENDING', STREAM, GROUP, 'IDLE', lease, '-', '+', 1)[1]
if expired then
  redis.call('XCLAIM', STREAM, GROUP, builder, 0, expired[1], 'JUSTID')
  leave(expired[2])
  return take(build_of(expired[1]))
end
local read = redis.call('XREADGROUP', 'GROUP', GROUP, builder, 'COUNT', 1, 'STREAMS', STREAM, '>')
if read then
  return take(read[1][2][1][2][2])
end
leave(builder)
local wait = -1
for _, pending in ipairs(redis.call('XPENDING', STREAM, GROUP, '-', '+', ALL)) do
  local left = lease - pending[3]
  wait = wait < 0 and left or math.min(wait, left)
end
local info, last = redis.call('XINFO', 'STREAM', STREAM), '0-0'
for i = 1, #info, 2 do
  last = info[i] == 'last-generated-id' and info[i + 1] or last
end
return {last, wait}
""")

# Renews a claim's lease.
# Keys: stream. Arguments: build id; secret of the claim.
# Result: nil when the claim is lost; the reason why the build was cancelled; empty.
RENEW = _script("""
local build = key('build', ARGV[1])
local claim, phase, entry, builder, cancelled = unpack(
  redis.call('HMGET', build, 'claim', 'phase', 'entry', 'builder', 'cancelled'))
if claim ~= ARGV[2] or phase == 'done' then
  return false
end
ensure_group()
redis.call('XCLAIM', STREAM, GROUP, builder, 0, entry, 'JUSTID')
return cancelled or ''
""")

# Gives a claim back: the build stays in its slot, for the next builder, and this attempt does not count.
# Keys: stream. Arguments: build id; secret of the claim.
# Result: 1; 0 when the claim is lost.
RELEASE = _script("""
local id, build = ARGV[1], key('build', ARGV[1])
local claim, phase, entry, builder = unpack(redis.call('HMGET', build, 'claim', 'phase', 'entry', 'builder'))
if claim ~= ARGV[2] or phase == 'done' then
  return 0
end
ensure_group()
redis.call('XACK', STREAM, GROUP, entry)
redis.call('XDEL', STREAM, entry)
leave(builder)
redis.call('HSET', build, 'claim', 'released', 'entry', redis.call('XADD', STREAM, '*', 'build', id))
redis.call('HINCRBY', build, 'attempt', -1)
return 1
""")

# Lets the lease of a dead builder run out, so that the next claim takes the build.
# Keys: stream. Arguments: build id; number of the attempt that was the builder's; lease (ms).
# Result: 1; 0 when that attempt has ended.
ABANDON = _script("""
local build = key('build', ARGV[1])
local phase, attempt, claim, entry, builder = unpack(
  redis.call('HMGET', build, 'phase', 'attempt', 'claim', 'entry', 'builder'))
if phase ~= 'running' or attempt ~= ARGV[2] or claim == 'released' then
  return 0
end
ensure_group()
redis.call('XCLAIM', STREAM, GROUP, builder, 0, entry, 'IDLE', ARGV[3], 'JUSTID')
return 1
""")

# Appends to the log of a running build. A call that is repeated, as its answer was lost, appends once.
# Keys: stream. Arguments: build id; secret of the claim; id of the call; text.
# Result: 1; 0 when the claim is lost.
APPEND = _script("""
local build = key('build', ARGV[1])
local claim, phase, appended = unpack(redis.call('HMGET', build, 'claim', 'phase', 'appended'))
if claim ~= ARGV[2] or phase == 'done' then
  return 0
end
if appended ~= ARGV[3] then
  redis.call('APPEND', key('log', ARGV[1]), ARGV[4])
  redis.call('HSET', build, 'appended', ARGV[3])
end
return 1
""")

# Ends a claimed build and frees its slot, and keeps its log.
# Keys: stream. Arguments: build id; secret of the claim; exit status; digest; reason; size of the log; the log
# compressed; the lock compressed, or empty; retention (s); limits.
# Result: 'done', also when it is repeated; 'lost' when the claim is; 'grown' when the log has another size.
FINISH = _script("""
local id, retention, limit, most = ARGV[1], ARGV[9], tonumber(ARGV[10]), tonumber(ARGV[11])
local claim, phase = unpack(redis.call('HMGET', key('build', id), 'claim', 'phase'))
if claim ~= ARGV[2] then
  return 'lost'
elseif phase == 'done' then
  return 'done'
elseif redis.call('STRLEN', key('log', id)) ~= tonumber(ARGV[6]) then
  return 'grown'
end
redis.call('SET', key('kept', id), ARGV[7], 'EX', retention)
if ARGV[8] ~= '' then
  redis.call('SET', key('lock', id), ARGV[8], 'EX', retention)
end
free(id, limit, most)
finish(id, ARGV[3], ARGV[4], ARGV[5], retention, limit, most)
return 'done'
""")

# Ends a build that nobody has claimed, or has the builder told that has.
# Keys: stream. Arguments: build id; reason; id of the call; retention (s); exit status; limits.
# Result: 1; 0 when it is done, or unknown.
CANCEL = _script("""
local id, reason, call, limit, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[6]), tonumber(ARGV[7])
local build = key('build', id)
local phase, canceller, claim = unpack(redis.call('HMGET', build, 'phase', 'canceller', 'claim'))
if not phase or phase == 'done' then
  return canceller == call and 1 or 0
end
redis.call('HSETNX', build, 'cancelled', reason)
redis.call('HSETNX', build, 'canceller', call)
if not claim then
  free(id, limit, most)
  finish(id, ARGV[5], '', reason, ARGV[4], limit, most)
end
return 1
""")

# What is waiting and running.
# Keys: stream. Result: builds without a builder; builds with one.
COUNT = _script("""
local waiting, claimed = tonumber(redis.call('HGET', TOTALS, 'waiting') or 0), 0
if redis.call('EXISTS', STREAM) == 1 and #redis.call('XINFO', 'GROUPS', STREAM) > 0 then
  claimed = count_claimed()
end
return {waiting + redis.call('XLEN', STREAM) - claimed, claimed}
""")

ALL = (RESERVE, HOLD, SUBMIT, CLAIM, RENEW, RELEASE, ABANDON, APPEND, FINISH, CANCEL, COUNT)
