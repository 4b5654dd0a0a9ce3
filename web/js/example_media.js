// Opening an example workflow puts the portrait and the speech that it names into input/, so that Run just works.
// Only files that are missing are added; nothing is ever overwritten.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const EXAMPLES = {
  "pctalk_portrait.jpg": new URL("../examples/portrait.jpg", import.meta.url),
  "pctalk_speech.flac": new URL("../examples/speech.flac", import.meta.url),
};

function namedBy(graph) {
  const subgraphs = graph.definitions?.subgraphs ?? [];
  const values = [graph, ...subgraphs]
    .flatMap((part) => part.nodes ?? [])
    .filter((node) => node.type === "LoadImage" || node.type === "LoadAudio")
    .flatMap((node) => Object.values(node.widgets_values ?? {}));
  return Object.keys(EXAMPLES).filter((name) => values.includes(name));
}

async function isInInput(name) {
  const where = new URLSearchParams({ filename: name, type: "input" });
  const answer = await api.fetchApi(`/view?${where}`, { method: "HEAD", cache: "no-store" });
  return answer.ok;
}

async function copyToInput(name) {
  const file = await fetch(EXAMPLES[name]);
  if (!file.ok) throw new Error(`${EXAMPLES[name]}: ${file.status} ${file.statusText}`);
  const form = new FormData();
  form.append("image", new File([await file.blob()], name));
  const answer = await api.fetchApi("/upload/image", { method: "POST", body: form });
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
}

app.registerExtension({
  name: "PCTalk.ExampleMedia",
  // Before the nodes exist, so that their lists already hold the files when ComfyUI looks for what is missing.
  async beforeConfigureGraph(graph) {
    try {
      const missing = [];
      for (const name of namedBy(graph)) {
        if (!(await isInInput(name))) missing.push(name);
      }
      if (!missing.length) return;
      await Promise.all(missing.map(copyToInput));
      await app.refreshComboInNodes();
    } catch (error) {
      console.error("PC-Talk could not copy its example files to input/:", error);
    }
  },
});
