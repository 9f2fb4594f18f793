// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// elsewhere are words that other tools have for what tarn calls otherwise, or does not
// do, and what to type instead. What means the same without a doubt is an alias of its
// command.
var elsewhere = map[string]string{
	"ps":      "tarn has no containers; tarn status says what is being downloaded, and by whom tarn is used",
	"top":     "tarn status says how tarn does",
	"info":    "tarn status says how tarn does, and tarn version which one it is",
	"stats":   "tarn status says how tarn does; its metrics are at /metrics of the admin listener",
	"df":      "tarn status says what is used of the store, and tarn images by which images",
	"du":      "tarn status says what is used of the store, and tarn images by which images",
	"inspect": "tarn images IMAGE -o json says what is here of an image, and tarn explain IMAGE why",
	"search":  "registries are not searched; tarn images --filter repository=PATTERN looks among what is here",
	"history": "tarn explain IMAGE says what happened to an image",
	"prune":   "nothing has to be pruned: what was used least makes room for what comes, within max_size; tarn evict IMAGE removes one image",
	"gc":      "nothing has to be collected: what was used least makes room for what comes, within max_size; tarn evict IMAGE removes one image",
	"clean":   "nothing has to be cleaned: what was used least makes room for what comes, within max_size; tarn evict IMAGE removes one image",
	"purge":   "nothing has to be purged: what was used least makes room for what comes, within max_size; tarn evict IMAGE removes one image",
	"logs":    "the daemon logs to its standard error: journalctl -u tarn, or kubectl logs of its pod",
	"log":     "the daemon logs to its standard error: journalctl -u tarn, or kubectl logs of its pod",
	"start":   "tarn serve runs the daemon; systemctl start tarn, where it is installed as a unit",
	"run":     "tarn serve runs the daemon; systemctl start tarn, where it is installed as a unit",
	"daemon":  "tarn serve runs the daemon",
	"server":  "tarn serve runs the daemon",
	"stop":    "the daemon ends with SIGTERM: systemctl stop tarn, or kubectl delete of its pod",
	"restart": "systemctl restart tarn; tarn reload has most of the configuration read anew without",
	"config":  "the configuration is the file that --config or TARN_CONFIG names; tarn reload has it read anew",
	"check":   "tarn hosts check proves that containerd asks tarn, and tarn verify checks what is stored",
	"doctor":  "tarn hosts check proves that containerd asks tarn, and tarn status says what is wrong",
	"install": "tarn hosts install has containerd ask tarn",
	"login":   "tarn keeps no passwords: clients' pass to the registry, and the node's own are in the file that credentials: of an upstream names",
	"logout":  "tarn keeps no passwords: the node's own are in the file that credentials: of an upstream names",
	"push":    "tarn only serves pulls: push to the registry itself",
	"tag":     "what a tag means is the registry's to say",
	"build":   "tarn only serves pulls",
	"exec":    "tarn has no containers",
	"load":    "tarn has what registries say; tarn pull IMAGE fetches an image",
	"import":  "tarn has what registries say; tarn pull IMAGE fetches an image",
	"fetch":   "tarn pull IMAGE fetches an image into the store",
	"warm":    "tarn pull IMAGE fetches an image into the store",
	"preload": "tarn pull IMAGE fetches an image into the store",
	"save":    "the data directory is an OCI image layout: skopeo copy oci:DIR:NAME docker-archive:FILE",
	"export":  "the data directory is an OCI image layout: skopeo copy oci:DIR:NAME docker-archive:FILE",
	"pins":    "tarn pin lists what is pinned",
}

// otherWords are commands that fail with the right one's name, whatever follows them.
func otherWords() (all []*cobra.Command) {
	for word, instead := range elsewhere {
		all = append(all, &cobra.Command{
			Use:                word,
			Hidden:             true,
			DisableFlagParsing: true,
			RunE: func(*cobra.Command, []string) error {
				return fmt.Errorf("there is no command %q: %s", word, instead)
			},
		})
	}
	return all
}
