// Markdown as DOM nodes. Text of a model's is only ever a text node: no HTML of its own is read, and links lead to
// http, https and mailto alone. Whatever the text is, time grows with its length and no faster: what a pattern looks
// ahead is bounded, and what is longer than that is no markup.

const INLINE = new RegExp(
  [
    /(?<!`)(?<ticks>`{1,9})(?!`)(?<code>[^]{0,1000}?[^`])\k<ticks>(?!`)/,
    /\*\*(?<bold>[^\s*](?:[^]{0,1000}?[^\s])?)\*\*/,
    /(?<![\w*])\*(?<italic>[^\s*](?:[^*]{0,1000}?[^\s*])?)\*(?!\w)/,
    /(?<!\w)_(?<under>[^\s_](?:[^_]{0,1000}?[^\s_])?)_(?!\w)/,
    /~~(?<struck>[^~]{1,1000})~~/,
    /(?<!!)\[(?<label>[^\]]{1,500})\]\((?<target>[^\s()]{1,2000}(?:\([^\s()]{0,500}\)[^\s()]{0,500}){0,4})\)/,
    /(?<url>https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_])/,
  ]
    .map((pattern) => pattern.source)
    .join("|"),
);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A fragment of the text's blocks. A fence that isn't closed yet is code to the end. */
export function markdown(text) {
  const fragment = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), fragment, 0);
  return fragment;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const CELLS = /^[\s:|-]+$/;
const LONG = 2000; // characters of a line that may be a heading

function blocks(lines, parent, depth) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      const last = run(lines, at + 1, (other) => !other.trim().startsWith(fence[1]) || /[^`~\s]/.test(other));
      const code = element("code", {}, lines.slice(at + 1, last).join("\n"));
      const label = fence[2] ? `Code, ${fence[2]}` : "Code";
      parent.append(element("pre", { tabindex: "0", role: "region", "aria-label": label }, code));
      at = last + 1;
    } else if (heading(line)) {
      const [, marks, words] = heading(line);
      const made = element(`h${Math.min(marks.length + 2, 6)}`);
      inline(words, made);
      parent.append(made);
      at += 1;
    } else if (RULE.test(line)) {
      parent.append(element("hr"));
      at += 1;
    } else if (depth < 8 && QUOTE.test(line)) {
      const end = run(lines, at, (other) => QUOTE.test(other));
      const quote = element("blockquote");
      blocks(lines.slice(at, end).map((other) => other.replace(QUOTE, "")), quote, depth + 1);
      parent.append(quote);
      at = end;
    } else if (depth < 8 && ITEM.test(line)) {
      at = list(lines, at, parent, depth);
    } else if (line.includes("|") && underlines(lines[at + 1] ?? "")) {
      const end = run(lines, at, (other) => other.includes("|"));
      parent.append(table(lines.slice(at, end)));
      at = end;
    } else {
      const end = run(lines, at, (other, index) => other.trim() && (index === at || !begins(other, depth)));
      const paragraph = element("p");
      inline(lines.slice(at, end).join("\n"), paragraph);
      parent.append(paragraph);
      at = end;
    }
  }
}

function heading(line) {
  return line.length < LONG && HEADING.exec(line);
}

/** Whether this is the line under a table's head. */
function underlines(line) {
  return line.includes("|") && line.includes("-") && CELLS.test(line);
}

function begins(line, depth) {
  return FENCE.test(line) || heading(line) || RULE.test(line) || (depth < 8 && (QUOTE.test(line) || ITEM.test(line)));
}

function run(lines, from, belongs) {
  let end = from;
  while (end < lines.length && belongs(lines[end], end)) end += 1;
  return end;
}

function list(lines, from, parent, depth) {
  const [, indent, mark] = ITEM.exec(lines[from]);
  const numbered = /\d/.test(mark);
  const made = element(numbered ? "ol" : "ul", numbered ? { start: String(parseInt(mark, 10)) } : {});
  let at = from;
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (!found || found[1].length > indent.length + 1 || /\d/.test(found[2]) !== numbered) break;
    const width = found[1].length + found[2].length + 1;
    // What is indented further is the item's, and blank lines between.
    const end = run(lines, at + 1, (other, index) => other.search(/\S/) > indent.length || (!other.trim() && (lines[index + 1] ?? "").search(/\S/) > indent.length));
    const item = element("li");
    const inner = lines.slice(at + 1, end).map((other) => other.slice(Math.min(width, Math.max(0, other.search(/\S/)))));
    blocks([found[3], ...inner], item, depth + 1);
    // One paragraph alone is the item's text.
    if (item.firstChild?.nodeName === "P") item.firstChild.replaceWith(...item.firstChild.childNodes);
    made.append(item);
    at = run(lines, end, (other, index) => !other.trim() && ITEM.test(lines[index + 1] ?? ""));
  }
  parent.append(made);
  return at;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, kind) => {
    const made = element("tr");
    for (const words of cells(line)) {
      const cell = element(kind);
      inline(words.trim(), cell);
      made.append(cell);
    }
    return made;
  };
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  const made = element("table", {}, element("thead", {}, row(lines[0], "th")), body);
  return element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, made);
}

function inline(text, parent, depth = 0) {
  let rest = text;
  for (;;) {
    const found = depth < 6 ? INLINE.exec(rest) : null;
    if (!found) break;
    const { code, bold, italic, under, struck, label, target, url } = found.groups;
    parent.append(rest.slice(0, found.index));
    rest = rest.slice(found.index + found[0].length);
    if (code !== undefined) parent.append(element("code", {}, code.trim() || code));
    else if (bold !== undefined) nested("strong", bold);
    else if (italic !== undefined || under !== undefined) nested("em", italic ?? under);
    else if (struck !== undefined) nested("del", struck);
    else if (/^(https?:|mailto:)/i.test(target ?? url)) {
      const link = element("a", { href: target ?? url, target: "_blank", rel: "noopener noreferrer" });
      if (label === undefined) link.append(url);
      else inline(label, link, 6);
      parent.append(link);
    } else parent.append(found[0]);
  }
  parent.append(rest);

  function nested(name, words) {
    const made = element(name);
    inline(words, made, depth + 1);
    parent.append(made);
  }
}
