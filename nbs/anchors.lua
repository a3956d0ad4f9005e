-- Names in the text are links to the code that defines them: `fit` to training.html#fit, a method to training.html#recipe.check.
-- Each definition is shown once, as its source, and gets its anchor here; private ones get none.

local seen = {}

-- Where a line of code begins to define something public: the anchor, such as `kd_loss` or `cachedteacher.fill`.
local function anchor(line, following)
  local name = line:match('^def ([%a][%w_]*)%(') or line:match('^class ([%a][%w_]*)')
  local method = line:match('^def ([%w_]+)%(')
  local owner = method and (line .. following):match('^def [%w_]+%(%s*self:%s*([%a][%w_]*)')
  if owner then name = not method:match('^_[^_]') and owner .. '.' .. method or nil end
  return name and name:lower()
end

function CodeBlock(block)
  if not quarto.doc.is_format('html') or not block.classes:includes('python') then return end
  local lines, found = {}, pandoc.Blocks {}
  for line in (block.text .. '\n'):gmatch('(.-)\n') do table.insert(lines, line) end
  for i, line in ipairs(lines) do
    local id = anchor(line, lines[i + 1] or '')
    if id and not seen[id] then
      seen[id] = true
      found:insert(pandoc.Div({}, {id = id}))
    end
  end
  if #found > 0 then return found .. {block} end
end
