-- A blockquote that begins with a bold `Warning.` or `Warning: title` becomes a callout box on the site.
-- Colab, Jupyter and GitHub know no such boxes: there it stays a blockquote.

local kinds = {Note = 'note', Tip = 'tip', Important = 'important', Caution = 'caution', Warning = 'warning'}

-- All inlines but the first, without a space in front.
local function rest(inlines)
  local others = pandoc.Inlines {table.unpack(inlines, 2)}
  if #others > 0 and (others[1].t == 'Space' or others[1].t == 'SoftBreak') then others:remove(1) end
  return others
end

function BlockQuote(quote)
  local first = quote.content[1]
  local bold = first and first.t == 'Para' and first.content[1]
  if not bold or bold.t ~= 'Strong' then return end
  local kind = kinds[pandoc.utils.stringify(bold.content[1]):match('^(%a+)[.:]$')]
  if not kind then return end

  local title, text = rest(bold.content), rest(first.content)
  quote.content:remove(1)
  if #text > 0 then quote.content:insert(1, pandoc.Para(text)) end
  return quarto.Callout {type = kind, title = #title > 0 and title or nil, content = quote.content}
end
