-- struct: what the servers have built in and fakeredis lacks, as far as the scripts use it: big-endian, s and d.

local struct = {}

-- The eight bytes of a double; whole numbers from 0 up are all that is ever packed.
local function double_to_bytes(number)
  if number == 0 then return string.rep('\0', 8) end
  local fraction, exponent = math.frexp(number)
  local bytes, rest = {}, (fraction * 2 - 1) * 2 ^ 52
  for at = 8, 3, -1 do
    bytes[at], rest = rest % 256, math.floor(rest / 256)
  end
  exponent = exponent + 1022
  bytes[2], bytes[1] = exponent % 16 * 16 + rest, math.floor(exponent / 16)
  return string.char(unpack(bytes))
end

local function double_from_bytes(text, at)
  local bytes = {string.byte(text, at, at + 7)}
  if #bytes < 8 then error('data string too short') end
  local exponent, rest = bytes[1] * 16 + math.floor(bytes[2] / 16), bytes[2] % 16
  for place = 3, 8 do rest = rest * 256 + bytes[place] end
  return exponent == 0 and 0 or math.ldexp(rest / 2 ^ 52 + 1, exponent - 1023)
end

function struct.pack(format, ...)
  local values, packed = {...}, {}
  for at = 2, #format do
    local value = values[at - 1]
    packed[#packed + 1] = string.sub(format, at, at) == 's' and value .. '\0' or double_to_bytes(value)
  end
  return table.concat(packed)
end

function struct.unpack(format, text, at)
  local values, place = {}, at or 1
  for position = 2, #format do
    if string.sub(format, position, position) == 's' then
      local stop = string.find(text, '\0', place, true)
      if not stop then error('unfinished string') end
      values[position - 1], place = string.sub(text, place, stop - 1), stop + 1
    else
      values[position - 1], place = double_from_bytes(text, place), place + 8
    end
  end
  values[#format] = place
  return unpack(values, 1, #format)
end
