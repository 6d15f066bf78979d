// What the page shows of its state: bits, figures, answers, and the table of where predictions change.

import { atBits, element, inBits, inBytes, inMilliseconds, inPercent, largest, shortName } from "./words.js";

const $ = (id) => document.getElementById(id);

/** The stops below the slider; `choose(index)` is called for one that is clicked. */
export function showStops(models, choose) {
  $("slider").max = models.length - 1;
  $("slider").disabled = models.length < 2;
  $("stops").replaceChildren(
    ...models.map((model, index) => {
      const stop = element("span", "", model.bits === 32 ? "float" : String(model.bits));
      stop.onclick = () => choose(index);
      return stop;
    }),
  );
  $("cells").replaceChildren(...Array.from({ length: 8 }, () => element("i")));
}

/** Where the slider is. */
export function showBits(models, index) {
  const { bits } = models[index];
  $("slider").value = index;
  $("slider").setAttribute("aria-valuetext", inBits(bits));
  $("bits").textContent = bits;
  $("bits-words").textContent = bits === 32 ? "bits per weight, float" : bits === 1 ? "bit per weight" : "bits per weight";
  [...$("cells").children].forEach((cell, at) => {
    cell.style.setProperty("--fill", `${100 * Math.min(1, Math.max(0, bits - at))}%`);
  });
  [...$("stops").children].forEach((stop, at) => stop.classList.toggle("now", at === index));
}

/** Bytes, time and accuracy of the model that the slider is at; `loaded`, `result` and `picture` may be missing yet. */
export function showFigures(family, model, loaded, result, picture) {
  $("size").textContent = inBytes(loaded?.bytes ?? model.bytes);
  const ratio = family.float_bytes && model.bits !== 32 ? family.float_bytes / model.bytes : null;
  $("size-note").textContent = !loaded ? (picture ? "on its way" : "when there is a picture") : ratio ? `${ratio.toFixed(1)} × smaller than float` : "of this network";
  $("time").textContent = result ? inMilliseconds(result.ms) : "–";
  $("time-note").textContent = result ? `+ ${inMilliseconds(result.prepared)} for the picture` : "";
  const measured = family.accuracy !== null && family.models.some(({ top1 }) => top1 !== null);
  $("accuracy-figure").hidden = !measured;
  $("figures").classList.toggle("two", !measured);
  if (measured) {
    $("top1").textContent = model.top1 === null ? "unknown" : `${model.top1.toFixed(1)} %`;
    $("top1-note").textContent = family.accuracy.dataset;
  }
}

/** The five likeliest classes with bars; a mark on each where `before`, a result at more bits, had it. */
export function showAnswers(labels, result, before) {
  const list = $("answers");
  const top = largest(result.probabilities, Math.min(5, labels.length));
  while (list.children.length > top.length) list.lastChild.remove();
  while (list.children.length < top.length) {
    const track = element("div", "track", element("div", "fill"), element("div", "before"));
    list.append(element("li", "", element("span", "name"), element("span", "share"), track));
  }
  top.forEach((label, place) => {
    const [name, share, track] = list.children[place].children;
    name.textContent = name.title = labels[label];
    share.textContent = inPercent(result.probabilities[label]);
    track.firstChild.style.width = `${100 * result.probabilities[label]}%`;
    track.lastChild.hidden = !before;
    if (before) track.lastChild.style.left = `${100 * before.result.probabilities[label]}%`;
  });
  list.classList.remove("stale");
  showVerdict(labels, top[0], before);
}

function showVerdict(labels, label, before) {
  const verdict = $("verdict");
  verdict.classList.remove("changed");
  if (!before) return void (verdict.textContent = "");
  const { bits: more } = before.model;
  const bits = more === 32 ? "float" : `at ${inBits(more)}`;
  const [was] = largest(before.result.probabilities, 1);
  if (was === label) {
    verdict.textContent = `The same answer as ${bits}; the marks show the confidence there.`;
  } else {
    verdict.classList.add("changed");
    verdict.textContent = `Changed: ${more === 32 ? "float said" : `${bits} it said`} ${labels[was]}, ${inPercent(before.result.probabilities[was])}.`;
  }
}

/** Until an answer is there, the old one stays, faded. */
export function fadeAnswers() {
  $("answers").classList.add("stale");
  $("verdict").textContent = "";
}

/** How much of a download has arrived; `null` hides it. */
export function showProgress(progress, words) {
  $("progress").hidden = progress === null;
  if (progress === null) return;
  const { received, total } = progress;
  if (total) $("bar").value = Math.min(1, received / total);
  else $("bar").removeAttribute("value");
  $("progress-words").textContent = `${words}: ${inBytes(received)}${total ? ` of ${inBytes(total)}` : ""}`;
}

/** An error in words, or `null` when all is well again. */
export function showNotice(text) {
  $("notice").hidden = text === null;
  $("notice").textContent = text ?? "";
}

/**
 * Rows of pictures, columns of bit-widths, in each cell the answer, marked if it is not that at the most bits.
 * @param {{key: string, caption: string, url: string}[]} pictures
 * @param {(key: string, model: object) => object | undefined} find the result of a picture and a model
 */
export function showChanges(family, index, pictures, find) {
  $("changes").closest("section").hidden = !pictures.length;
  const { models, labels } = family;
  $("changes").style.setProperty("--columns", models.length);
  const head = element("tr", "", element("th", "", "Picture"));
  models.forEach((model, at) => {
    const cell = element("th", at === index ? "now" : "", inBits(model.bits));
    cell.scope = "col";
    head.append(cell);
  });
  const rows = pictures.map(({ key, caption, url }) => {
    const image = element("img");
    [image.src, image.alt] = [url, ""];
    const name = element("th", "", element("div", "", image, element("span", "", caption)));
    name.scope = "row";
    name.title = caption;
    let first = null;
    const cells = models.map((model) => {
      const result = find(key, model);
      if (!result) return element("td", "empty", "·");
      const [label] = largest(result.probabilities, 1);
      const cell = element("td", "", shortName(labels[label]));
      cell.append(element("small", "", inPercent(result.probabilities[label])));
      cell.title = `${labels[label]}, ${inPercent(result.probabilities[label])} ${atBits(model.bits)}`;
      first ??= label;
      if (label !== first) {
        cell.className = "changed";
        cell.append(element("span", "unseen", ", changed"));
      }
      return cell;
    });
    return element("tr", "", name, ...cells);
  });
  $("changes").replaceChildren(element("thead", "", head), element("tbody", "", ...rows));
  $("changes-words").textContent = changesInWords(family, pictures, find);
  if (index !== inSight) scrollTo(head.children[index + 1], head.firstChild.offsetWidth);
  inSight = index;
}

let inSight = null; // index of the column that was scrolled to

/** Bring a column of the table into sight, right of the first one, which stays, without moving the page. */
function scrollTo(cell, covered) {
  const box = $("changes").parentElement;
  const [left, right] = [cell.offsetLeft - covered, cell.offsetLeft + cell.offsetWidth];
  if (left < box.scrollLeft) box.scrollLeft = left;
  if (right > box.scrollLeft + box.clientWidth) box.scrollLeft = right - box.clientWidth;
}

/** How many pictures have another answer than at the most bits, where all pictures have been run. */
function changesInWords({ models }, pictures, find) {
  const answers = models.map((model) => pictures.map(({ key }) => find(key, model)).filter(Boolean));
  const top = (result) => largest(result.probabilities, 1)[0];
  const full = models.map((model, at) => ({ model, results: answers[at] })).filter(({ results }) => results.length === pictures.length);
  if (full.length < 2) return "Each bit-width’s answer to each picture, as far as they have been run.";
  const [reference, ...others] = full;
  const counts = others.map(({ model, results }) => ({
    where: atBits(model.bits),
    changed: results.filter((result, at) => top(result) !== top(reference.results[at])).length,
  }));
  const some = counts.filter(({ changed }) => changed);
  const than = inBits(reference.model.bits);
  const all = pictures.length === 1 ? "The picture has the same answer" : `All ${pictures.length} pictures have the same answers`;
  if (!some.length) return `${all} at fewer bits as with ${than}.`;
  const [{ changed, where }, ...more] = some;
  const parts = [`${changed} ${changed === 1 ? "differs" : "differ"} from ${than} ${where}`];
  for (const next of more) parts.push(`${next.changed} ${next.where}`);
  return `Of ${pictures.length} ${pictures.length === 1 ? "picture" : "pictures"}, ${parts.join(", ")}.`;
}
